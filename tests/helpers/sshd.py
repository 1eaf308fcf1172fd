"""sshd on hosts of the tests, with a key of its own: nothing outside of its folder is written."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from hosts import Hosts
from hosts import missing as missing_hosts

SSHD = "/usr/sbin/sshd"


def missing() -> str | None:
    """Why there can be no sshd here; None if there can."""
    for program in (SSHD, "ssh", "ssh-keygen"):
        if not shutil.which(program):
            return f"needs {program}"
    return missing_hosts()


class Sshd:
    """Every host answers to ssh from every other."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        """The hosts must be up; the servers go with them."""
        self._hosts, self._folder = hosts, folder
        self.servers: dict[int, subprocess.Popen[bytes]] = {}
        folder.mkdir(mode=0o700)
        for name in ("id", "hostkey"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        key = " ".join((folder / "hostkey.pub").read_text().split()[:2])
        known = [f"{name},{hosts.address(i)} {key}" for i, name in enumerate(hosts.names)]
        (folder / "known_hosts").write_text("\n".join([*known, ""]))
        server = {
            "HostKey": folder / "hostkey",
            "AuthorizedKeysFile": folder / "id.pub",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "StrictModes": "no",
            "UsePAM": "no",
            "UseDNS": "no",
            "PidFile": "none",
        }
        client = {
            "IdentityFile": folder / "id",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": folder / "known_hosts",
            "StrictHostKeyChecking": "yes",
            "LogLevel": "ERROR",
        }
        self.config = folder / "ssh_config"
        for path, settings in ((folder / "sshd_config", server), (self.config, client)):
            path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd does not start without
        for host in range(len(hosts.names)):
            self.start(host)

    def start(self, host: int) -> None:
        """The server of a host, and whatever is started through it: a machine that can die."""
        command = [SSHD, "-D", "-e", "-f", str(self._folder / "sshd_config")]
        self.servers[host] = self._hosts.start(host, command, self._folder / f"sshd{host}.log")
        for _ in range(200):
            if self.run(host, "true").returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError((self._folder / f"sshd{host}.log").read_text())

    def run(self, host: int, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, from host 0."""
        ssh = ["ssh", "-F", str(self.config), self._hosts.names[host], command]
        return self._hosts.run(0, ssh)

    def processes(self, host: int, word: str) -> list[str]:
        """The command lines on a host that have this word."""
        found = self.run(host, "ps -eo args").stdout.splitlines()
        return [line for line in found if word in line and "ps -eo" not in line]
