"""An Indexed Job as its controller runs it, on this machine: each pod on a host of hosts.py, with
the job's own command, names and variables.

A pod that ended is made again, or the job ends, as podFailurePolicy, backoffLimitPerIndex and
successPolicy say. A pod that is made again has another address, and none until then. There is no
image: pods see the files of this machine, the work tree in the place of the image's, and the
ConfigMap where the job mounts it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from hosts import Hosts, ip
from k8s_check import action_for, problems
from paths import ROOT

BACKOFF_SECONDS = 1.0  # ten in a cluster
FROM_IMAGE = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
IN_POD = 'mount --rbind "$1" /etc; shift; exec "$@"'


@dataclass
class Pod:
    """One index of the job: what runs now, and what was before."""

    index: int
    process: subprocess.Popen[bytes] | None = None
    address: str = ""
    conditions: tuple[str, ...] = ()
    attempts: int = 0
    counted: int = 0
    kill_at: float = field(default=float("inf"))
    start_at: float = 0.0
    is_pending: bool = False


class IndexedJob:
    """A manifest of kind Job, running. ``events`` has a line for everything that happened."""

    def __init__(self, hosts: Hosts, manifest: str, folder: Path) -> None:
        """``folder`` takes the pods' logs. Starts all pods."""
        assert not problems(manifest)
        documents = {d["kind"]: d for d in yaml.safe_load_all(manifest)}
        self._config: dict[str, str] = documents["ConfigMap"]["data"]
        self.name: str = documents["Job"]["metadata"]["name"]
        self._spec: dict[str, Any] = documents["Job"]["spec"]
        self._pod_spec: dict[str, Any] = self._spec["template"]["spec"]
        self._hosts, self._folder, self._begin = hosts, folder, time.monotonic()
        self.events: list[str] = []
        self.status = ""
        self.pods = [Pod(index) for index in range(self._spec["completions"])]
        for pod in self.pods:
            shutil.copytree("/etc", self._etc(pod), symlinks=True)
            for mount in self._pod_spec["containers"][0]["volumeMounts"]:
                if mount["name"] == "config":
                    place = self._etc(pod) / Path(mount["mountPath"]).relative_to("/etc")
                    place.mkdir()
                    for name, text in self._config.items():
                        (place / name).write_text(text)
        for pod in self.pods:
            self._create(pod)

    def _etc(self, pod: Pod) -> Path:
        return self._folder / f"etc-{pod.index}"

    def log(self, index: int) -> Path:
        """What a pod said, in all its attempts."""
        return self._folder / f"pod-{index}.log"

    def _say(self, text: str) -> None:
        self.events.append(f"{time.monotonic() - self._begin:6.1f} s  {text}")
        print(self.events[-1], file=sys.stderr, flush=True)

    def _create(self, pod: Pod) -> None:
        host = self._hosts.names[pod.index]
        prefix = self._hosts.address(0).rpartition(".")[0]
        pod.address = f"{prefix}.{10 + pod.index + len(self.pods) * pod.attempts}"
        ip("-n", host, "address", "flush", "dev", "eth0")
        ip("-n", host, "address", "add", f"{pod.address}/24", "dev", "eth0")
        self._write_names()
        container = self._pod_spec["containers"][0]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        name = f"{self.name}-{pod.index}"
        kept = {
            key: os.environ[key] for key in ("PATH", "VIRTUAL_ENV", "HOME") if key in os.environ
        }
        given = {"HOSTNAME": name, "JOB_COMPLETION_INDEX": str(pod.index)}
        environment = kept | FROM_IMAGE | given | variables
        command = self._hosts.command(
            pod.index,
            [
                *("bash", "-c", IN_POD, "pod", str(self._etc(pod))),
                *(*container["command"], *container["args"]),
            ],
            name=name,
            hosts_file=self._etc(pod) / "hosts",
        )
        with self.log(pod.index).open("ab") as log:
            pod.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=ROOT
            )
        pod.attempts += 1
        pod.conditions, pod.kill_at = (), float("inf")
        self._say(f"pod {pod.index} created, at {pod.address}")

    def _write_names(self) -> None:
        """What the headless Service answers; a kubelet writes a pod's own line."""
        domain = self._pod_spec["subdomain"]
        whole = f"{domain}.default.svc.cluster.local"
        peers = {pod.index: pod.address for pod in self.pods if pod.address}
        lines = [
            f"{address} {self.name}-{index}.{domain} {self.name}-{index}.{whole}"
            for index, address in peers.items()
        ]
        for pod in self.pods:
            own = f"{pod.address} {self.name}-{pod.index}.{whole} {self.name}-{pod.index}"
            text = "\n".join(["127.0.0.1 localhost", *([own] * bool(pod.address)), *lines, ""])
            (self._etc(pod) / "hosts").write_text(text)

    def kill(self, index: int, *conditions: str, for_good: bool = False) -> None:
        """SIGKILL to all of a pod, as when memory is short; with DisruptionTarget, when its node is
        gone. ``for_good``: there is no other node that a new pod could run on."""
        self._say(f"pod {index} gets SIGKILL")
        pod = self.pods[index]
        pod.conditions, pod.is_pending = conditions, for_good
        assert pod.process
        pod.process.kill()

    def evict(self, index: int, *conditions: str) -> None:
        """SIGTERM to a pod's first process, SIGKILL after the time that it has."""
        self._say(f"pod {index} gets SIGTERM")
        pod = self.pods[index]
        pod.conditions = (*pod.conditions, *conditions)
        pod.kill_at = time.monotonic() + self._pod_spec["terminationGracePeriodSeconds"]
        assert pod.process
        for first in psutil.Process(pod.process.pid).children():
            first.send_signal(signal.SIGTERM)

    def tick(self) -> None:
        """Look after every pod once."""
        for pod in self.pods:
            now = time.monotonic()
            if pod.process is None:
                if now > pod.start_at and not pod.is_pending and not self.status:
                    self._create(pod)
            elif pod.process.poll() is not None:
                self._ended(pod, pod.process.returncode)
            elif now > pod.kill_at:
                self.kill(pod.index, *pod.conditions)

    def _ended(self, pod: Pod, returned: int) -> None:
        code = returned if returned >= 0 else 128 - returned
        pod.process, pod.address, pod.start_at = None, "", float("inf")
        self._write_names()
        action = action_for(self._spec["podFailurePolicy"], code, pod.conditions)
        if code == 0:
            self._say(f"pod {pod.index} succeeded")
            if str(pod.index) == self._spec["successPolicy"]["rules"][0]["succeededIndexes"]:
                self._finish("Complete")
            return
        self._say(f"pod {pod.index} ended with exit code {code}: {action}")
        if action == "FailJob":
            self._finish("Failed: PodFailurePolicy")
        elif action == "Ignore":
            pod.start_at = 0.0
        else:
            pod.counted += 1
            pod.start_at = time.monotonic() + BACKOFF_SECONDS
            if pod.counted > self._spec["backoffLimitPerIndex"]:
                self._finish("Failed: FailedIndexes")

    def _finish(self, status: str) -> None:
        if not self.status:
            self.status = status
            self._say(f"job {status}")
            for pod in self.pods:
                if pod.process and pod.process.poll() is None:
                    self.evict(pod.index)

    def wait(self, seconds: float) -> str:
        """Look after the pods until all have ended for good; returns how the job ended."""
        deadline = time.monotonic() + seconds
        while not self.status or any(pod.process for pod in self.pods):
            assert time.monotonic() < deadline, self.story()
            self.tick()
            time.sleep(0.05)
        return self.status

    def wait_for_step(self, run: Path, step: int, seconds: float) -> None:
        """Look after the pods until the run has noted a step."""
        log, deadline = run / "metrics.jsonl", time.monotonic() + seconds
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            assert not self.status, self.story()
            assert time.monotonic() < deadline, self.story()
            self.tick()
            time.sleep(0.005)

    def story(self) -> str:
        """Everything that happened, and the end of what each pod said."""
        said = [self.log(pod.index).read_text()[-3000:] for pod in self.pods]
        return "\n".join([*self.events, *said])

    def close(self) -> None:
        """End what is left."""
        for pod in self.pods:
            if pod.process and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait(timeout=30)
