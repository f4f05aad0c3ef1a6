"""A hub of models on loopback: what huggingface_hub asks for when it creates a repository and uploads a folder."""

import base64
import json
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.tools.faulty_server import running

COMMIT = "c" * 40
TOKEN = "hf_" + "s" * 30  # the only one that it accepts


class UploadHub(ThreadingHTTPServer):
    """``files`` are those of each repository by path. ``refused`` maps a part of a path to the status it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refused: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {path}")
        status = next((status for part, status in self.server.refused.items() if part in path), None)
        if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._answer(status, {"error": "refused"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        else:
            self._of_repository(path, body)

    do_HEAD = do_POST = do_GET

    def _create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.files
        self.server.files.setdefault(name, {".gitattributes": b""})
        self.server.private.setdefault(name, wanted.get("visibility") == "private")
        self._answer(409 if known else 200, {"url": f"{self.server.url}/{name}"})

    def _of_repository(self, path: str, body: bytes) -> None:
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/.]+)(?:\.git)?(/.*)?", path)
        files = self.server.files.get(match[1]) if match else None
        if match is None or files is None:
            self._answer(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
            return
        name, rest = match[1], match[2] or ""
        if rest.startswith("/resolve/main/"):
            known = rest.removeprefix("/resolve/main/") in files
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT} if known else {"X-Error-Code": "EntryNotFound"}
            self._answer(200 if known else 404, {}, headers)
        elif rest.startswith("/tree/"):
            self._answer(200, [{"type": "file", "path": each, "size": 1, "oid": "0"} for each in files])
        elif rest.startswith("/preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer(200, {"files": modes})
        elif rest.startswith("/commit/"):
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"{self.server.url}/{name}/commit/{COMMIT}"
            self._answer(200, {"commitOid": COMMIT, "commitUrl": url, "success": True})
        else:  # the repository itself, and whether it can be written
            self._answer(200, {"id": name, "private": self.server.private[name], "sha": COMMIT, "siblings": []})

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for key, value in {**(headers or {}), **own}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def upload_hub() -> AbstractContextManager[UploadHub]:
    return running(UploadHub())
