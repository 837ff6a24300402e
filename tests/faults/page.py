"""Faults of the page, on loopback: requests cut, odd or no HTTP at all, uploads with odd names. It goes on serving."""

import contextlib
import importlib.util
import os
import signal
import socket
import time
from pathlib import Path
from typing import Self

import numpy as np

from faults.calls import Child, serpent

HOST = "127.0.0.1"
_UPLOAD = (
    b"POST /gradio_api/upload HTTP/1.1\r\nHost: %s\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s"
)
_NAMES = (
    b"a.png",
    b".png",
    b"..png",
    b"",
    b" ",
    b"a b.png",
    b"\xc3\xa4.png",
    b"a" * 300 + b".png",
    b"a.png.txt",
    b"%41.png",
)


class Page:
    """One page in a child, started at the first fault."""

    def __init__(self, folder: Path):
        self.folder, self._child, self._port = folder, None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child:
            self._child.send(signal.SIGINT)  # so that it removes its files
            self._child.end(10)

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self._port = free.getsockname()[1]
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        self._child = Child(serpent("demo", "--port", str(self._port)), self.folder)
        for _ in range(600):
            if self._serves():
                return
            time.sleep(0.1)
        raise SystemExit("the page does not start: " + self._child.end(1).said)

    def _serves(self) -> bool:
        return self._ask(b"GET /config HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % HOST.encode()).startswith(
            b"HTTP/1.1 200"
        )

    def _ask(self, request: bytes, *, seconds: float = 10, wait: bool = True) -> bytes:
        got = b""
        with contextlib.suppress(OSError), socket.create_connection((HOST, self._port), seconds) as connection:
            connection.sendall(request)
            while wait and (more := connection.recv(1 << 16)):
                got += more
        return got

    def fault(self, rng: np.random.Generator) -> str:
        """One request; what is wrong after it, "" for nothing."""
        if importlib.util.find_spec("gradio") is None:
            return ""
        if not self._child:
            self._start()
        assert self._child
        self._child.read()
        name = _NAMES[int(rng.integers(len(_NAMES)))]
        part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--b--\r\n'
        body = part % (name, rng.bytes(int(rng.integers(0, 5000))))
        whole = _UPLOAD % (HOST.encode(), len(body), body)
        how = str(rng.choice(["upload", "cut", "noise", "api"]))
        if how == "upload":
            answer = self._ask(whole)
            if not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")):
                return f"an upload named {name[:20]!r} is answered by {answer[:40]!r}"
        elif how == "cut":
            self._ask(whole[: int(rng.integers(1, len(whole)))], wait=False)
        elif how == "noise":
            self._ask(rng.bytes(int(rng.integers(1, 500))) + b"\r\n\r\n", seconds=2)
        else:
            sent = [b"{", b"[]", b'{"data": null}', b'{"data": [1, 2, 3]}'][int(rng.integers(4))]
            place = [b"/gradio_api/call/none", b"/gradio_api/queue/join", b"/none"][int(rng.integers(3))]
            head = b"POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self._ask((head + b"Content-Length: %d\r\n\r\n%s") % (place, HOST.encode(), len(sent), sent))
        return "" if self._serves() else f"after {how}: the page serves no more"
