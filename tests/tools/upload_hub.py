"""A hub of models on loopback: what huggingface_hub asks for when it creates a repository and uploads a folder."""

import base64
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from werkzeug import Request, Response
from werkzeug.serving import make_server

from tests.tools.faulty_server import running

COMMIT = "c" * 40
TOKEN = "hf_" + "s" * 30  # the only one that it accepts


class UploadHub:
    """``files`` are those of each repository by path. ``refused`` maps a part of a path to the status it answers."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refused: dict[str, int] = {}
        self.url = ""

    @Request.application
    def __call__(self, request: Request) -> Response:
        status = next((status for part, status in self.refused.items() if part in request.path), None)
        if status is not None or request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _json({"error": "refused"}, status or 401)
        if request.path == "/api/validate-yaml":
            return _json({"warnings": [], "errors": []})
        if request.path == "/api/repos/create":
            wanted = request.get_json()
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in self.files
            self.files.setdefault(name, {".gitattributes": b""})
            self.private.setdefault(name, wanted.get("visibility") == "private")
            return _json({"url": f"{self.url}/{name}"}, 409 if known else 200)
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/.]+)(?:\.git)?(/.*)?", request.path)
        if found is None or found[1] not in self.files:
            return _json({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self._of_repository(found[1], found[2] or "", request)

    def _of_repository(self, name: str, place: str, request: Request) -> Response:
        files = self.files[name]
        if place.startswith("/resolve/main/"):
            known = place.removeprefix("/resolve/main/") in files
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT} if known else {"X-Error-Code": "EntryNotFound"}
            return _json({}, 200 if known else 404, headers)
        if place.startswith("/tree/"):
            return _json([{"type": "file", "path": each, "size": 1, "oid": "0"} for each in files])
        if place.startswith("/preupload/"):
            paths = [file["path"] for file in request.get_json()["files"]]
            return _json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        if place.startswith("/commit/"):
            for operation in map(json.loads, request.get_data().splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            return _json({"commitOid": COMMIT, "commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "success": True})
        # the repository itself, and whether it can be written
        return _json({"id": name, "private": self.private[name], "sha": COMMIT, "siblings": []})


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, content_type="application/json")


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    hub = UploadHub()
    server = make_server("127.0.0.1", 0, hub, threaded=True)
    hub.url = f"http://127.0.0.1:{server.port}"
    with running(server):
        yield hub
