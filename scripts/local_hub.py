"""A small endpoint that speaks the Hub's protocol on this machine, for the real huggingface_hub client.

    create repo · validate YAML · preupload · LFS batch, upload, verify · commit (branch or pull request) ·
    info · tree · resolve (whole files and ranges)

    python scripts/local_hub.py FOLDER --port 8765      prints its address; HF_ENDPOINT=that is all a client needs

Files go by LFS: the newer storage, which the client uses wherever hf_xet is installed, is a service of its own and
not imitated here, so a client needs HF_HUB_DISABLE_XET=1. The tests use it to push and pull without a network and to
make it fail on purpose: `faults` holds answers that are given once each in place of the true one, or a connection that
is cut after so many bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
SAMPLE_BYTES = 512


@dataclass
class Fault:
    """One failure to come: for the first request whose `METHOD path` matches, this status, or a cut connection."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after_bytes: int | None = None
    message: str = "a fault made on purpose"


@dataclass
class Repo:
    """One repository: visibility, and for each branch its commits, the last one last."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": ["0" * 40]})
    files: dict[str, dict[str, str]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, a pull request or a commit names."""
        return (
            self.branches[revision][-1] if revision in self.branches else revision if revision in self.files else None
        )


class LocalHub(ThreadingHTTPServer):
    """The endpoint; content lies in `folder`/blobs by sha256. `requests` keeps every line that was asked."""

    daemon_threads = True

    def __init__(self, folder: Path, token: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, content: bytes) -> str:
        """Keep a blob; returns its sha256."""
        name = hashlib.sha256(content).hexdigest()
        (self.blobs / name).write_bytes(content)
        return name

    def start(self) -> LocalHub:
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing; `requests` has it."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        line = f"{self.command} {path}"
        with self.server.lock:
            fault = next((one for one in self.server.faults if re.search(one.pattern, line)), None)
            if fault:
                self.server.faults.remove(fault)
            self.server.requests.append(line)
        if fault and fault.cut_after_bytes is not None:
            self.rfile.read(fault.cut_after_bytes)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies.append(self.body)
        if fault:
            return self._json(fault.status, {"error": fault.message}, fault.headers)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                given = self.headers.get("Authorization") == f"Bearer {self.server.token}"
                if not given and not path.startswith("/lfs/"):
                    return self._json(401, {"error": "Invalid username or password."})
                with self.server.lock:
                    return action(self, **match.groupdict())
        return self._json(404, {"error": f"no such route: {line}"})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send(status, content, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, one in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, one)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, name: str) -> Repo | None:
        found = self.server.repos.get(name)
        if found is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def _at(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.commit_of(revision)
        if commit is None:
            self._json(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, commit

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = f"{self.server.address}/{name}"
        if name in self.server.repos:
            return self._json(409, {"error": "You already created this model repo", "url": address, "id": name})
        private = asked.get("visibility", "public") == "private" or bool(asked.get("private"))
        self.server.repos[name] = Repo(private)
        return self._json(200, {"url": address, "id": name})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        local = re.search(r"^base_model:\s*([./~].*|\S+/\S+/\S+)$", content, flags=re.M)
        errors = [{"message": f'"base_model" with value "{local[1]}" is not valid'}] if local else []
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def whoami(self) -> None:
        self._json(200, {"type": "user", "name": "me", "orgs": [], "auth": {}})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._at(repo, revision)
        if found:
            files = [{"rfilename": name} for name in sorted(found[0].files[found[1]])]
            self._json(200, {"id": repo, "sha": found[1], "private": found[0].private, "siblings": files, "tags": []})

    def branch(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found and revision in found.branches:
            return self._json(409, {"error": "Reference already exists"})
        if found:
            found.branches[revision] = list(found.branches["main"])
            self._json(200, {})
        return None

    def preupload(self, repo: str, revision: str) -> None:
        found = self._at(repo, revision)
        if found:
            files = json.loads(self.body)["files"]
            large = lambda one: one["path"].endswith((".safetensors", ".png")) or one["size"] > 10_000_000  # noqa: E731
            modes = [("lfs" if large(one) else "regular", one["path"]) for one in files]
            self._json(200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for mode, p in modes]})

    def batch(self, repo: str) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if not (self.server.blobs / one["oid"]).is_file():
                places = {"upload": "lfs", "verify": "verify"}
                answer["actions"] = {
                    name: {"href": f"{self.server.address}/{place}/{one['oid']}"} for name, place in places.items()
                }
            objects.append(answer)
        self._json(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json(400, {"error": "content does not have the sha256 that was announced"})
        self.server.put(self.body)
        return self._json(200, {})

    def verify(self, oid: str) -> None:
        known = (self.server.blobs / oid).is_file()
        self._json(200 if known else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self._at(repo, revision)
        if not found:
            return None
        kept, parent = found
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit") not in (None, parent):
            return self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(kept.files[parent])
        for one in operations:
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = self.server.put(base64.b64decode(value["content"]))
            elif not (self.server.blobs / value["oid"]).is_file():
                return self._json(400, {"error": f"{value['path']} was never uploaded"})
            else:
                files[value["path"]] = value["oid"]
        oid = secrets.token_hex(20)
        kept.files[oid] = files
        answer = {"commitUrl": f"{self.server.address}/{repo}/commit/{oid}", "commitOid": oid}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in kept.branches)
            kept.branches[f"refs/pr/{number}"] = [parent, oid]
            answer["pullRequestUrl"] = f"{self.server.address}/{repo}/discussions/{number}"
        else:
            kept.branches[revision].append(oid)
        return self._json(200, answer)

    def tree(self, repo: str, revision: str) -> None:
        found = self._at(repo, revision)
        if found:
            rows = []
            for path, sha in sorted(found[0].files[found[1]].items()):
                size = (self.server.blobs / sha).stat().st_size
                rows.append({"type": "file", "oid": sha[:40], "size": size, "path": path})
            self._json(200, rows)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._at(repo, revision)
        if not found:
            return None
        sha = found[0].files[found[1]].get(path)
        if sha is None:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = (self.server.blobs / sha).read_bytes()
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{sha}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)


ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", _Handler.branch),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>.+)", _Handler.tree),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{REPO}", _Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", "/verify/(?P<oid>[0-9a-f]{64})", _Handler.verify),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)", _Handler.resolve),
)


def main() -> None:
    """Serve until interrupted; the token is whatever HF_TOKEN is."""
    import os

    parser = argparse.ArgumentParser(description="A local endpoint that speaks the Hub's protocol.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    hub = LocalHub(asked.folder, os.environ.get("HF_TOKEN", ""), asked.port)
    print(hub.address, flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
