"""A file server on loopback that misbehaves on a schedule, and can replace the datasets hub."""

import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee0000000000000000000000000000c0ffee"
FAULTS = ("refuse", "429", "503", "stall", "reset", "truncate", "no_length", "short", "long", "cut_range")


Fault = Callable[[int], str | None]


class FaultyServer(ThreadingHTTPServer):
    """Serves ``folder``. ``fault(n)`` names what goes wrong with request number n, or None.

    refuse: closed without an answer; 429 and 503: with Retry-After; stall: half a body, then nothing; reset: half a
    body, then RST; truncate: half a body, then FIN; no_length: the same without Content-Length; short, long: a wrong
    Content-Length; cut_range: an answer to another range than asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path, fault: Fault, *, ranges: bool = True, etag: bool = True, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder, self.fault, self.ranges, self.etag = folder, fault, ranges, etag
        self.last_modified: str | None = None
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.faults: list[str] = []
        self.stall_seconds = 3.0
        self.retry_after = {"429": "1", "503": "0"}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def paths(self) -> list[str]:
        # newer clients of the hub also ask once for something of their own
        return [path.partition("?")[0] for path, _ in self.requests if not path.startswith("/api/agent")]

    def next_fault(self, path: str, headers: dict[str, str]) -> str | None:
        with self._lock:
            self.requests.append((path, headers))
            fault = self.fault(len(self.requests) - 1)
            if fault == "cut_range" and not (self.ranges and "range" in headers):
                return None  # nothing to cut
            if fault:
                self.faults.append(fault)
            return fault

    def handle_error(self, request, client_address):  # a client that leaves early is not an error here
        pass


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a small body waits 40 ms after its headers

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        fault = self.server.next_fault(self.path, {name.lower(): value for name, value in self.headers.items()})
        path = self.path.partition("?")[0]
        if fault == "refuse":
            self._reset()
        elif fault in ("429", "503"):
            self._answer(int(fault), b"busy", {"Retry-After": self.server.retry_after[fault]})
        elif match := re.fullmatch(r"/api/datasets/(.+/.+)/revision/(.+)", path):
            known = match[2] in ("main", COMMIT)
            body = json.dumps({"id": match[1], "sha": COMMIT} if known else {"error": "Invalid rev id"}).encode()
            self._answer(200 if known else 404, body, {} if known else {"X-Error-Code": "RevisionNotFound"}, fault)
        elif re.fullmatch(rf"/api/datasets/.+/.+/tree/{COMMIT}", path):
            self._tree(fault)
        elif match := re.fullmatch(rf"/datasets/.+/.+/resolve/{COMMIT}/(.+)", path):
            headers = {"Location": f"/blobs/{match[1]}", "X-Linked-Etag": '"linked"', "X-Repo-Commit": COMMIT}
            self._answer(302, b"", headers)
        else:
            self._file(self.server.folder / path.removeprefix("/blobs").lstrip("/"), fault)

    def _tree(self, fault: str | None) -> None:
        """The files of the folder, three on a page."""
        folder = self.server.folder
        paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        at = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        entries = [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in paths[at : at + 3]]
        body = json.dumps([{"type": "directory", "path": "a", "oid": "0"}, *entries]).encode()
        following = f'<{self.server.url}{urlsplit(self.path).path}?recursive=true&cursor={at + 3}>; rel="next"'
        self._answer(200, body, {"Link": following} if at + 3 < len(paths) else {}, fault)

    def _file(self, path: Path, fault: str | None) -> None:
        if not path.is_file():
            self._answer(404, b"no such file", {})
            return
        body = path.read_bytes()
        headers = {"ETag": f'"{zlib.crc32(body)}"'} if self.server.etag else {}
        if self.server.last_modified:
            headers["Last-Modified"] = self.server.last_modified
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, start = 200, 0
        if wanted and self.server.ranges:
            status, start = 206, int(wanted[1])
            if start >= len(body):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
                return
            if fault == "cut_range":
                start = start // 2 or 1
            end = min(len(body), int(wanted[2]) + 1) if wanted[2] else len(body)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            body = body[:end]
        self._answer(status, body[start:], headers, fault)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], fault: str | None = None) -> None:
        length = len(body)
        if fault == "short":
            length = length * 2 // 3
        elif fault == "long":
            length += 1000
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            if fault != "no_length" or name != "Content-Length":
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        if fault in ("reset", "stall", "truncate", "no_length"):
            body = body[: length // 2]
        self.wfile.write(body)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(self.server.stall_seconds)
        if fault in ("reset", "stall"):
            self.wfile.flush()
            self._reset()
        if fault:
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


Server = TypeVar("Server", bound=ThreadingHTTPServer)


def serving(folder: Path, fault: Fault = lambda n: None, **settings: int) -> AbstractContextManager[FaultyServer]:
    return running(FaultyServer(folder, fault, **settings))


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Serves from a thread inside the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
