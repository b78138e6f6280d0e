"""A stand-in for the Hugging Face hub on loopback: as much of its HTTP interface as a snapshot's download asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = dict[str, bytes]


@dataclass
class StandInHub:
    """Repositories by kind and name ("models/a/b"), each with commits (oldest first) of files."""

    repositories: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)
    cut: str | None = None
    """A file whose transfer ends half-way."""

    def commit(self, repository: str, files: Files) -> str:
        """Add a commit, to which main then points; returns its name."""
        name = hashlib.sha1(json.dumps([repository, len(self.repositories.get(repository, ()))]).encode()).hexdigest()
        self.repositories.setdefault(repository, []).append((name, files))
        return name

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        commits = self.repositories.get(repository, [])
        if revision == "main" and commits:
            return commits[-1]
        return next((each for each in commits if each[0] == revision), None)


@contextlib.contextmanager
def standing_in() -> Iterator[StandInHub]:
    """The hub while the block runs; programs find it by HF_ENDPOINT."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.asked.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[0] == "api" and parts[4:5] == ["commits"]:
                return self._commits("/".join(parts[1:4]), body)
            if parts[0] == "api" and parts[4:5] in (["revision"], ["tree"]):
                return self._describe("/".join(parts[1:4]), parts[4], parts[5], body)
            if "resolve" in parts:
                at = parts.index("resolve")
                owner = "/".join(parts[:at])
                repository = owner if owner.startswith("datasets/") else f"models/{owner}"
                return self._file(repository, parts[at + 1], "/".join(parts[at + 2 :]), body)
            return self._send(404, b"{}", body)

        def _describe(self, repository: str, what: str, revision: str, body: bool) -> None:
            found = hub.find(repository, revision)
            if found is None:
                code = "RevisionNotFound" if repository in hub.repositories else "RepoNotFound"
                return self._send(404, b"{}", body, {"X-Error-Code": code})
            commit, files = found
            tree = [{"type": "file", "path": n, "size": len(d), "oid": etag(d)} for n, d in files.items()]
            name = repository.partition("/")[2]
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self._send(200, json.dumps(tree if what == "tree" else info).encode(), body)

        def _commits(self, repository: str, body: bool) -> None:
            of = [
                {"id": name, "title": "", "message": "", "authors": [], "date": "2023-01-16T00:00:00.000Z"}
                for name, _ in reversed(hub.repositories.get(repository, []))
            ]
            return self._send(200, json.dumps(of).encode(), body)

        def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
            found = hub.find(repository, revision)
            if found is None or name not in found[1]:
                return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            data = found[1][name]
            headers = {"X-Repo-Commit": found[0], "ETag": f'"{etag(data)}"', "Accept-Ranges": "bytes"}
            first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self._send(206 if first else 200, data[first:], body, headers, cut=body and name == hub.cut)

        def _send(
            self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def etag(data: bytes) -> str:
    """The hub's name for a file's content: here, as for small files there, git's."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
