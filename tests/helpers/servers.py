"""Servers on loopback for the tests of remote shards: a web server that can misbehave, and S3."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec

Fault = Callable[["Handler", bytes], None]
"""Answers a request instead of sending the bytes that were asked for."""


class WebServer(ThreadingHTTPServer):
    """Serves a folder, with ranges. ``faults[name]`` is used up by requests for that file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, folder))
        self.faults: dict[str, list[Fault]] = {}
        self.sent_whole = Counter[str]()
        """How often each file was sent from its first byte to its last."""
        self.whole_files = threading.Event()
        """Whole files wait for it."""
        self.whole_files.set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: WebServer
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        if not (self.folder / name).is_file():
            return self.answer(404, b"no such file")
        data = (self.folder / name).read_bytes()
        if self.server.faults.get(name):
            return self.server.faults[name].pop(0)(self, data)
        return self.send(data)

    def send(self, data: bytes, name: str = "") -> None:
        """The range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        whole = len(data)
        if asked:
            data = data[int(asked[1]) : int(asked[2]) + 1]
        if asked and len(data) == whole:
            self.server.whole_files.wait(60)
            self.server.sent_whole[self.path.lstrip("/")] += 1
        self.answer(206 if asked else 200, data)

    def answer(self, status: int, body: bytes, length: int | None = None) -> None:
        """A whole answer, or one that breaks off before ``length``."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on stderr."""


def cut(handler: Handler, data: bytes) -> None:
    handler.answer(206, data[: len(data) // 3], length=len(data))


def stall(handler: Handler, data: bytes) -> None:
    handler.answer(206, data[:100], length=len(data))
    handler.wfile.flush()
    time.sleep(4)


def error_page(handler: Handler, data: bytes) -> None:
    handler.answer(200, b"<html>please log in</html>")


def short(handler: Handler, data: bytes) -> None:
    handler.answer(206, data[:1000])


def other_content(handler: Handler, data: bytes) -> None:
    handler.send(bytes(len(data)))


def ignore_range(handler: Handler, data: bytes) -> None:
    handler.answer(200, data)


def status(code: int) -> Fault:
    return lambda handler, data: handler.answer(code, b"no")


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    server = WebServer(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def free_ports(count: int) -> list[int]:
    """Ports p with p + 10000 free too, where SeaweedFS puts its gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + 10000))
                found.append(port)
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """SeaweedFS, which checks signatures; yields the environment that finds it."""
    folder.mkdir()
    keys = {"accessKey": "reader", "secretKey": "secret-of-the-test"}
    identity = {"name": "reader", "credentials": [keys], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = free_ports(4)
    command = [
        *(str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-s3"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={folder / 's3.json'}"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-s3.port={s3}", "-master.volumeSizeLimitMB=64", "-volume.max=20"),
    ]
    environment = {
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    before = {name: os.environ.get(name) for name in environment}
    try:
        os.environ.update(environment)
        deadline = time.monotonic() + 90
        while True:
            system = fsspec.filesystem("s3", skip_instance_cache=True)
            try:
                system.mkdir("corpora")
                break
            except Exception:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield environment
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
