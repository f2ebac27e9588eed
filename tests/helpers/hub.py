"""A Hub on localhost: as much of the protocol as the real huggingface_hub client needs of it.

Repositories, commits, branches, private and gated repositories, downloads and commits; no LFS.
Where a test asks for it, some answers are faults: of the server, of the way, or lies.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder and of those in it, by their path there."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclass
class Repository:
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        tree = {**(self.files(branch) or {}), **files}
        oid = hashlib.sha1(repr(sorted(tree.items())).encode() + branch.encode()).hexdigest()
        self.branches[branch], self.commits[oid] = oid, tree
        return oid


class LocalHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.fault: str | int | Callable[[], object] | None = None  # as in `_Handler._fail`
        self.faulty = ""  # what requests it befalls, as a regex of "GET /path"
        self.struck = 0  # how many it befell
        threading.Thread(target=self.serve_forever, args=[0.01]).start()

    def add(
        self, repo_id: str, folder: Path, prefix: str = "", branch: str = "main", **kwargs: bool
    ) -> Repository:
        """Publish the files of a folder and of those in it."""
        repository = self.repositories.setdefault(repo_id, Repository(**kwargs))
        files = files_of(folder).items()
        repository.commit({prefix + name: content for name, content in files}, branch)
        return repository


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_HEAD(self) -> None:
        self._download()

    do_GET = do_HEAD  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        if self._is_struck() and not callable(self.server.fault):  # before anything is done
            return self._reply(200, b'{"success": true}', {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":
            return self._json(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            request = json.loads(body)
            repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
            if repo_id not in self.server.repositories:
                self.server.repositories[repo_id] = Repository()
                self.server.repositories[repo_id].commit({".gitattributes": b""})
            return self._json(200, {"url": f"http://{self.headers['Host']}/{repo_id}"})
        _, _, _, owner, name, action, revision = path.split("/", 6)
        repository = self.server.repositories[f"{owner}/{name}"]
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json(200, {"files": [{"path": file["path"], **modes} for file in files]})
        assert action == "commit", path
        operations = [json.loads(line) for line in body.splitlines()]
        files = [operation["value"] for operation in operations if operation["key"] == "file"]
        contents = {file["path"]: base64.b64decode(file["content"]) for file in files}
        oid = repository.commit(contents, revision)
        url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{oid}"
        return self._json(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _download(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            return self._describe(*path.split("/")[3:])
        owner, name, action, revision, file = path[1:].split("/", 4)
        repository = self.server.repositories.get(f"{owner}/{name}")
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not authorized):
            return self._json(401, {}, {"X-Error-Code": "RepoNotFound"})  # as the Hub does
        if repository.gated and not authorized:
            return self._json(403, {}, {"X-Error-Code": "GatedRepo"})
        files = repository.files(revision)
        if files is None:
            return self._json(404, {}, {"X-Error-Code": "RevisionNotFound"})
        commit = repository.branches.get(revision, revision)
        if action != "resolve" or file not in files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._json(404, {}, missing)
        content = files[file]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._reply(200, content, {"X-Repo-Commit": commit, "ETag": etag})

    def _describe(
        self, owner: str, name: str, action: str = "revision", revision: str = "main"
    ) -> None:
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self._json(401, {}, {"X-Error-Code": "RepoNotFound"})
        commit, files = repository.branches.get(revision, revision), repository.files(revision)
        if action == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": "0"}
                for path, content in (files or {}).items()
            ]
            return self._json(200, tree)
        siblings = [{"rfilename": path} for path in files or {}]
        self._json(200, {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings})

    def _json(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        self._reply(status, json.dumps(body).encode(), headers or {})

    def _is_struck(self) -> bool:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        return self.server.fault is not None and bool(re.search(self.server.faulty, request))

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        headers = {"Content-Length": str(len(body)), **headers}
        if not self._is_struck():
            return self._send(status, body, headers)
        self.server.struck += 1
        self._fail(self.server.fault, status, body, headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, fault: Any, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """A status, something that happens to the Hub meanwhile, a lie, or a broken connection."""
        half = body[: len(body) // 2]
        lies = {"html": b"<!doctype html><p>Log in", "empty": b"", "null": b"null", "half": half}
        if isinstance(fault, int):
            code = {"X-Error-Code": "RepoNotFound"} if fault == 401 else {}  # as the Hub does
            return self._send(fault, b"{}", {"Content-Length": "2", **code})
        if callable(fault):
            fault()
            return self._send(status, body, headers)
        if fault in lies:
            length = {"Content-Length": str(len(lies[fault]))}
            return self._send(status, lies[fault], {**headers, **length})
        if fault in ("bare", "another etag"):
            headers = {**headers, "ETag": "0"} if fault != "bare" else {}
            return self._send(status, body, {**headers, "Content-Length": str(len(body))})
        if fault.startswith("redirect"):
            where = self.path if fault == "redirect loop" else "http://127.0.0.1:9/nothing"
            return self._send(302, b"", {"Location": where, "Content-Length": "0"})
        if fault == "more than its length":
            self._send(status, body, {**headers, "Content-Length": str(len(half))})
        elif "body" in fault:
            self._send(status, half, headers)
        if "stall" in fault:
            threading.Event().wait(0.3)  # for longer than the client waits
        if "reset" in fault:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Keep quiet."""
