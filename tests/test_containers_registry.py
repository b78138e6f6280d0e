"""Fetching from a registry that asks for a token, keeps its files elsewhere, and cuts connections.

A stand-in over HTTP, since a real registry cannot be made to fail on purpose; tests/cluster fetches from a real one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.containers import registry
from pipeline.errors import UserError

LAYER, SETTINGS = bytes(range(256)) * 4000, b'{"architecture": "amd64"}'
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(data: bytes, **more: object) -> dict[str, object]:
    return {"digest": digest_of(data), "size": len(data), **more}


MANIFEST = json.dumps(
    {"mediaType": MANIFEST_TYPE, "config": descriptor(SETTINGS), "layers": [descriptor(LAYER), descriptor(LAYER)]}
).encode()
INDEX = json.dumps(
    {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            descriptor(b"another", platform={"os": "linux", "architecture": "riscv64"}),
            descriptor(MANIFEST, platform={"os": "linux", "architecture": "amd64"}),
        ],
    }
).encode()


@dataclass
class StandIn:
    """What the registry does wrong, and what it was asked."""

    port: int = 0
    cut_after: int | None = None
    """Bytes of a layer after which the connection ends, once."""
    damaged: bool = False
    login: str | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"docker://127.0.0.1:{self.port}/nvidia/tritonserver:22.08"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append((self.path, dict(self.headers)))
            respond(self, state)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = http.server_address[1]
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("APPTAINER_NOHTTPS", "1")
    monkeypatch.setattr(registry, "_PAUSE_S", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield state
    http.shutdown()
    http.server_close()


def respond(http: BaseHTTPRequestHandler, state: StandIn) -> None:
    path = http.path.removeprefix("/v2/nvidia/tritonserver/")
    if http.path.startswith("/token?"):
        wrong = state.login is not None and http.headers.get("Authorization") != f"Basic {state.login}"
        return send(http, 401 if wrong else 200, b'{"token": "t0ken"}')
    if http.path.startswith("/elsewhere/"):
        return send_layer(http, state)
    if http.headers.get("Authorization") != "Bearer t0ken":
        challenge = f'Bearer realm="http://127.0.0.1:{state.port}/token",service="s",scope="repository:x:pull"'
        return send(http, 401, b"", {"WWW-Authenticate": challenge})
    if path == f"blobs/{digest_of(LAYER)}":
        return send(http, 307, b"", {"Location": f"http://127.0.0.1:{state.port}/elsewhere/layer"})
    found = {
        "manifests/22.08": INDEX,
        f"manifests/{digest_of(INDEX)}": INDEX,
        f"manifests/{digest_of(MANIFEST)}": MANIFEST,
        f"blobs/{digest_of(SETTINGS)}": SETTINGS,
    }.get(path)
    return send(http, 404 if found is None else 200, found or b"")


def send_layer(http: BaseHTTPRequestHandler, state: StandIn) -> None:
    start = int(http.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
    data = LAYER[::-1][start:] if state.damaged else LAYER[start:]
    headers = {"Content-Length": str(len(data))}
    if state.cut_after is not None:
        data, state.cut_after = data[: state.cut_after], None
    send(http, 206 if start else 200, data, headers)


def send(http: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    http.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(body)
    http.close_connection = True


def fetch(state: StandIn, layout: Path) -> str:
    reference = registry.parse_reference(state.name)
    digest = registry.resolve(reference)
    registry.fetch(reference, digest, layout, lambda text: None)
    return digest


def blob(layout: Path, data: bytes) -> bytes:
    return (layout / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()).read_bytes()


def test_a_tag_becomes_a_digest_and_its_image_for_this_machine_an_oci_layout(server: StandIn, tmp_path: Path) -> None:
    digest = fetch(server, tmp_path)
    assert digest == digest_of(INDEX)
    assert json.loads((tmp_path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (image,) = json.loads((tmp_path / "index.json").read_text())["manifests"]
    assert (image["digest"], image["size"], image["mediaType"]) == (digest_of(MANIFEST), len(MANIFEST), MANIFEST_TYPE)
    assert (blob(tmp_path, MANIFEST), blob(tmp_path, SETTINGS), blob(tmp_path, LAYER)) == (MANIFEST, SETTINGS, LAYER)
    assert sorted(path.suffix for path in (tmp_path / "blobs" / "sha256").iterdir()) == ["", "", ""]


def test_the_token_stays_with_the_registry(server: StandIn, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    elsewhere = [headers for path, headers in server.asked if path.startswith("/elsewhere/")]
    assert len(elsewhere) == 1  # the layer stands twice in the manifest
    assert "Authorization" not in elsewhere[0]


def test_a_cut_connection_is_resumed_where_it_ended(server: StandIn, tmp_path: Path) -> None:
    server.cut_after = 300_000
    fetch(server, tmp_path)
    assert blob(tmp_path, LAYER) == LAYER
    ranges = [headers.get("Range") for path, headers in server.asked if path.startswith("/elsewhere/")]
    assert ranges == [None, "bytes=300000-"]


def test_what_an_interrupted_fetch_left_is_used(server: StandIn, tmp_path: Path) -> None:
    part = tmp_path / "blobs" / "sha256" / f"{hashlib.sha256(LAYER).hexdigest()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(LAYER[:1000])
    fetch(server, tmp_path)
    assert [headers.get("Range") for path, headers in server.asked if path.startswith("/else")] == ["bytes=1000-"]
    assert blob(tmp_path, LAYER) == LAYER


def test_a_damaged_layer_is_never_kept(server: StandIn, tmp_path: Path) -> None:
    server.damaged = True
    with pytest.raises(UserError, match=r"what arrived is not sha256:\w+; run it again"):
        fetch(server, tmp_path)
    assert not (tmp_path / "index.json").exists()
    assert not (tmp_path / "blobs" / "sha256" / hashlib.sha256(LAYER).hexdigest()).exists()


def test_a_login_is_taken_from_apptainers_file(server: StandIn, tmp_path: Path) -> None:
    server.login = base64.b64encode(b"$oauthtoken:secret").decode()
    with pytest.raises(UserError, match=r"refuses access \(401\); log in with `apptainer registry login`"):
        fetch(server, tmp_path / "layout")
    config = tmp_path / "home" / ".apptainer" / "docker-config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"auths": {f"127.0.0.1:{server.port}": {"auth": server.login}}}))
    assert fetch(server, tmp_path / "layout") == digest_of(INDEX)


def test_an_image_that_is_not_there_and_a_registry_that_is_not_are_one_line_each(
    server: StandIn, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"tritonserver:99\.99: no such image; look the tag up"):
        registry.resolve(registry.parse_reference(server.name.replace("22.08", "99.99")))
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\); run this stage where the internet"):
        registry.resolve(registry.parse_reference("docker://127.0.0.1:9/a/b:1"))


def test_what_is_no_registry_is_told_from_one_and_pins_nothing(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = b"<html>Welcome! Log in to use this network.</html>"
    monkeypatch.setitem(globals(), "INDEX", page)
    with pytest.raises(UserError, match=r"what answers is no registry, .*is there a proxy in between\?"):
        registry.resolve(registry.parse_reference(server.name))
    monkeypatch.setitem(globals(), "INDEX", b'{"schemaVersion": 1, "fsLayers": []}')
    with pytest.raises(UserError, match="an image of an old kind"):
        registry.resolve(registry.parse_reference(server.name))


def test_a_digest_that_is_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="no digest"):
        registry.Blob("sha256:../../../etc/passwd", 1)


def test_an_image_for_other_machines_only_is_refused(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.platform, "machine", lambda: "s390x")
    reference = registry.parse_reference(server.name)
    with pytest.raises(UserError, match="has no image for linux/s390x, only for linux/riscv64, linux/amd64"):
        registry.fetch(reference, digest_of(INDEX), Path("/nowhere"), lambda text: None)
