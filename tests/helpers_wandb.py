"""A stand-in for Weights & Biases' server on loopback: as much of it as the real `wandb sync` asks for."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StandInServer:
    """The runs' history lines by id, as the real server keeps them: at the offsets that the client gives."""

    url: str = ""
    runs: dict[str, list[str]] = field(default_factory=dict)

    def steps(self, run: str) -> list[int]:
        return [json.loads(line)["_step"] for line in self.runs[run]]


@contextlib.contextmanager
def standing_in() -> Iterator[StandInServer]:
    """The server while the block runs; wandb finds it by WANDB_BASE_URL."""
    state = StandInServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                answer = {"data": self._answer(json.loads(body))}
            elif self.path.endswith("/file_stream"):
                # a slow client says now and then that it is alive, with no file at all
                self._store(self.path.split("/")[-2], json.loads(body).get("files") or {})
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST

        def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
            said = request.get("variables") or {}
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            project = {"id": "p", "name": "hh", "entity": {"id": "e", "name": "me"}}
            match operation and operation[1]:
                case "RunResumeStatus":
                    return {"model": {**project, "bucket": self._bucket(said["name"])}}
                case "UpsertBucket":
                    state.runs.setdefault(said["name"], [])
                    run = {"id": "b", "name": said["name"], "displayName": "a run", "config": "{}", "project": project}
                    return {"upsertBucket": {"bucket": {**run, "historyLineCount": 0}, "inserted": True}}
                case "CreateRunFiles":
                    files = [{"name": name, "uploadUrl": f"{state.url}/upload/{name}"} for name in said["files"]]
                    return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            return {}

        def _bucket(self, run: str) -> dict[str, Any] | None:
            lines = state.runs.get(run)
            if not lines:
                return None
            return {
                **{"id": "b", "name": run, "displayName": "a run", "summaryMetrics": "{}", "config": "{}"},
                **{"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0, "eventsTail": "[]"},
                **{"historyTail": json.dumps(lines[-1:]), "tags": [], "notes": None, "wandbConfig": '{"t": 1}'},
            }

        def _store(self, run: str, files: dict[str, Any]) -> None:
            chunk = files.get("wandb-history.jsonl")
            if chunk:
                lines = state.runs[run]
                lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
