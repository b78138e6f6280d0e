"""Real tritonservers on a node that others use too: what answers to whom, and what others can see or change.

All of it under the worst of conditions: umask 000, a run directory that a group shares, in a folder that all may enter,
and proxies in the environment of servers and clients.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from cluster.ordinary_user import OrdinaryUser, missing_user
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from helpers_jobs import ROOT
from helpers_serving import converted_run, save_reward_model, serving_config
from tritonclient.utils import InferenceServerException

from pipeline import network, procs
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import tls, wire
from pipeline.serving.client import TritonScorer
from pipeline.serving.engines import Engine
from pipeline.serving.model_store import Manifest
from pipeline.serving.pool import Place
from pipeline.serving.server import TritonServer, make_spec
from pipeline.serving.service import supervise

pytestmark = pytest.mark.triton
MODEL = "reward-model"
BINDS = ("unix", "loopback", "network")
PROXY = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"), PROXY)


@dataclass
class Served:
    """A run with one server for each way to bind; `services[bind]` is what it published."""

    base: Path
    """Folder of all of it; every user may enter."""
    run: RunDir
    manifest: Manifest
    services: dict[str, endpoint.Endpoint]
    authority_key: ec.EllipticCurvePrivateKey
    """The key that signs this run's certificates: in truth nobody keeps it."""

    @property
    def store(self) -> Path:
        return self.run.artifact("convert", "model_store")

    @property
    def socket(self) -> Path:
        return Path(self.url("unix").removeprefix("unix:"))

    @property
    def certificates(self) -> Path:
        return self.run.endpoint.parent / "tls"

    def address(self, bind: str) -> wire.Address:
        found = self.services[bind]
        return wire.parse_address(found.triton_host, tls=found.tls)

    def url(self, bind: str) -> str:
        return self.address(bind).url


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hh-shared-", dir="/tmp"))
    folder.chmod(0o755)  # pytest's own folders are closed to others: nothing in them would prove anything
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def served(engine: Engine, base: Path) -> Iterator[Served]:
    keys: list[ec.EllipticCurvePrivateKey] = []
    generate = ec.generate_private_key

    def recorded(curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
        keys.append(generate(curve))
        return keys[-1]

    umask = os.umask(0)
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.callback(os.umask, umask)
        for name, value in PROXIES.items():
            patch.setenv(name, value)
        patch.setattr(ec, "generate_private_key", recorded)
        source = save_reward_model(base / "rm")
        run, manifest = converted_run(base / "run", source, serving_config())
        run.root.chmod(0o2775)
        running = [
            stack.enter_context(
                supervise(
                    run, serving_config(bind=bind), engine, [], run.root / f"{bind}.log", bind, wait=False, index=index
                )
            )
            for index, bind in enumerate(BINDS)
        ]
        while not all(each.up for each in running):
            for each in running:
                each.tick()
            time.sleep(0.1)
        os.umask(umask)
        yield Served(base, run, manifest, dict(zip(BINDS, endpoint.read_all(run), strict=True)), keys[0])


@dataclass
class Intruder:
    """Another user of the machine, with a folder of its own."""

    user: OrdinaryUser
    folder: Path

    def try_all(self, attempts: list[list[str]]) -> dict[str, str]:
        """What comes of each attempt when that user makes it."""
        done = self.user.run(
            sys.executable, ROOT / "tests" / "intruder.py", json.dumps(attempts),
            env=self.user.environment(PYTHONPATH=str(ROOT)),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(zip(map(" ".join, attempts), json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def intruder() -> Iterator[Intruder]:
    if os.getuid() != 0:
        pytest.skip("only root can act as a second user")
    reason = missing_user()
    assert reason is None or "CI" not in os.environ, reason
    if reason:
        pytest.skip(reason)
    user = OrdinaryUser.find()
    folder = user.folder("hh-intruder")
    tls.ensure(folder / "tls")  # of a run of its own
    yield Intruder(user, folder)
    shutil.rmtree(folder)


def regions_of(published: endpoint.Endpoint) -> list[Path]:
    """The shared memory of a server."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text(errors="replace") for pid in procs.session_pids(published.pid))
    return [path for path in Path("/dev/shm").glob("triton_hh_*") if path.name in maps]


def readings(served: Served) -> list[list[str]]:
    """What gives the model, the keys, or the texts away."""
    regions = [region for service in served.services.values() for region in regions_of(service)]
    assert len(regions) >= len(BINDS)
    store, keys = served.store, served.certificates
    secrets = [keys / "client.key", keys / "server.key", served.run.endpoint, endpoint.env_file(served.run), *regions]
    model = [store / "manifest.json", store / MODEL / "1/model.py", store / MODEL / "1/reward_model/model.safetensors"]
    folders = [keys.parent, keys, store, served.socket.parent]
    return [["read", str(path)] for path in (*secrets, *model)] + [["list", str(path)] for path in folders]


def test_another_user_of_the_node_can_neither_score_nor_read_nor_swap_the_model(
    served: Served, intruder: Intruder
) -> None:
    store, services = served.store, served.certificates.parent
    region = str(regions_of(served.services["unix"])[0])
    writings = [
        *(["write", str(store / MODEL / name)] for name in ("config.pbtxt", "1/model.py", "1/scoring.py")),
        *(["create", str(folder / "planted")] for folder in (store, store / MODEL / "1", services, services / "tls")),
        *(["replace", str(path)] for path in (store, services, served.run.endpoint, served.socket)),
        *(["replace", region], ["write", region], ["create", str(served.socket.parent / "planted")]),
    ]
    authority = shutil.copy(served.certificates / "ca.pem", intruder.folder / "ca.pem")  # had it leaked
    intruder.user.own(intruder.folder)
    told = intruder.try_all([*readings(served), *writings, ["connect", str(served.socket)]])
    assert set(told.values()) == {"PermissionError"}, told
    ways = [[], [str(intruder.folder / "tls")], ["", str(authority)]]
    scorings = [["score", served.url(bind), *way] for bind in BINDS for way in ways[: 1 if bind == "unix" else 3]]
    assert set(intruder.try_all(scorings).values()) == {"UNAVAILABLE"}


def test_the_same_attempts_succeed_for_who_started_the_servers(served: Served) -> None:
    import intruder

    scorings = [["score", served.url("unix")]]
    scorings += [["score", served.url(bind), str(served.certificates)] for bind in ("loopback", "network")]
    for words in (*readings(served), ["connect", str(served.socket)], *scorings):
        assert intruder.outcome(words) == "done", words


def calls(client: triton.InferenceServerClient) -> dict[str, list[Callable[[], object]]]:
    """Every part of Triton's gRPC service, by the names that its documentation gives them."""
    quick: dict[str, Any] = {"client_timeout": 10}
    return {
        "health": [
            lambda: client.is_server_live(**quick),
            lambda: client.is_server_ready(**quick),
            lambda: client.is_model_ready(MODEL, **quick),
        ],
        "metadata": [lambda: client.get_server_metadata(**quick), lambda: client.get_model_metadata(MODEL, **quick)],
        "inference": [lambda: wire.infer(client, MODEL, [[1, 2, 3]], 10)],
        "model-config": [lambda: client.get_model_config(MODEL, **quick)],
        "statistics": [lambda: client.get_inference_statistics(**quick)],
        **closed_calls(client),
    }


def closed_calls(
    client: triton.InferenceServerClient, headers: dict[str, str] | None = None
) -> dict[str, list[Callable[[], object]]]:
    """The parts that no client of a reward server needs."""
    quick: dict[str, Any] = {"client_timeout": 10, "headers": headers}
    return {
        "shared-memory": [
            lambda: client.get_system_shared_memory_status(**quick),
            lambda: client.register_system_shared_memory("mine", "/mine", 64, **quick),
            lambda: client.unregister_system_shared_memory(**quick),
            lambda: client.get_cuda_shared_memory_status(**quick),
            lambda: client.register_cuda_shared_memory("mine", b"bWluZQ==", 0, 64, **quick),
            lambda: client.unregister_cuda_shared_memory(**quick),
        ],
        "model-repository": [
            lambda: client.get_model_repository_index(**quick),
            lambda: client.load_model(MODEL, **quick),
            lambda: client.load_model("planted", config="{}", files={"file:1/model.py": b"evil"}, **quick),
            lambda: client.unload_model(MODEL, **quick),
        ],
        "trace": [
            lambda: client.get_trace_settings(**quick),
            lambda: client.update_trace_settings(settings={"trace_file": "/tmp/planted"}, **quick),
        ],
        "logging": [
            lambda: client.get_log_settings(**quick),
            lambda: client.update_log_settings({"log_file": "/tmp/planted"}, **quick),
        ],
    }


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InferenceServerException) as error:
        call()
    assert error.value.status() == "StatusCode.UNAVAILABLE"
    assert message in str(error.value.message())


def expired(served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's certificates, but for a client's that its own authority signed, and that is over."""
    shutil.copytree(served.certificates, folder)
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    with monkeypatch.context() as patch:
        year_ago = tls._now() - tls._VALID - datetime.timedelta(days=1)
        patch.setattr(tls, "_now", lambda: year_ago)
        issuer = (authority, served.authority_key)
        over = tls._certificate("trainer.hh-pipeline", key, issuer, ExtendedKeyUsageOID.CLIENT_AUTH)
    (folder / "client.pem").write_bytes(over.public_bytes(serialization.Encoding.PEM))
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "client.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return folder


def foreign(served: Served, folder: Path) -> Path:
    """The certificates of another run, with this one's authority to check the server by."""
    tls.ensure(folder)
    shutil.copy(served.certificates / "ca.pem", folder / "ca.pem")
    return folder


def test_no_part_of_the_service_answers_without_a_certificate_of_this_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = [("grpc.ssl_target_name_override", wire.SERVER_NAME)]
    authority = served.certificates / "ca.pem"
    another, over = foreign(served, tmp_path / "another"), expired(served, tmp_path / "over", monkeypatch)
    for bind in ("loopback", "network"):
        url = served.url(bind)
        strangers = {
            "in the clear": wire.open_client(wire.Address(url, MODEL)),
            "no certificate": triton.InferenceServerClient(
                url, ssl=True, root_certificates=str(authority), channel_args=name
            ),
            "another run's": wire.open_client(wire.Address(url, MODEL, str(another))),
            "expired": wire.open_client(wire.Address(url, MODEL, str(over))),
        }
        for client in strangers.values():
            for part in calls(client).values():
                for call in part:
                    refused(call, "")
            client.close()
        credentials = grpc.ssl_channel_credentials(authority.read_bytes())
        for channel in (grpc.insecure_channel(url), grpc.secure_channel(url, credentials, options=name)):
            for method in ("grpc.health.v1.Health/Check", "grpc.reflection.v1alpha.ServerReflection/Nothing"):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(f"/{method}")(b"", timeout=10)
                assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            channel.close()


def test_a_client_trusts_no_server_but_its_runs(served: Served, tmp_path: Path) -> None:
    """Who takes the port of a server that has ended cannot make rewards up."""
    folder = tmp_path / "tls"
    tls.ensure(folder)
    for name in ("client.pem", "client.key"):  # the server would take us
        shutil.copy(served.certificates / name, folder / name)
    for bind in ("loopback", "network"):
        client = wire.open_client(wire.Address(served.url(bind), MODEL, str(folder)))
        refused(lambda client=client: wire.infer(client, MODEL, [[1]], 10), "")  # type: ignore[misc]
        client.close()


def test_what_no_client_needs_is_closed_to_all_even_with_what_ps_shows(served: Served) -> None:
    words = Path(f"/proc/{served.services['unix'].pid}/cmdline").read_text().split("\0")
    (option,) = (word for word in words if word.startswith("--grpc-restricted-protocol="))
    header, _, value = option.rpartition(":")[2].partition("=")
    assert header != header.lower()  # no client can send it
    for bind in BINDS:
        client = wire.open_client(served.address(bind))
        for headers in (None, {f"triton-grpc-protocol-{header.lower()}": value}):
            for part in closed_calls(client, headers).values():
                for call in part:
                    refused(call, "This protocol is restricted")
        with pytest.raises(InferenceServerException, match="Invalid metadata"):
            client.get_log_settings(headers={f"triton-grpc-protocol-{header}": value})
        client.close()
        over_the_wire = ask_log_settings(served.socket, f"triton-grpc-protocol-{header}", value)
        assert b"log_file" not in over_the_wire
        assert b"grpc-status\x010" not in over_the_wire
    assert not Path("/tmp/planted").exists()
    assert b"This protocol is restricted" in ask_log_settings(served.socket, "x-nothing", "nothing")


def ask_log_settings(path: Path, header: str, value: str) -> bytes:
    """The bytes that answer a request which is written by hand, since no client lets one write such a header."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    method = "/inference.GRPCInferenceService/LogSettings"
    headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers"}
    headers |= {"content-type": "application/grpc", header: value}
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(text)]) + text.encode()
        for name, text in headers.items()
    )
    settings, body = frame(4, 0, 0, b""), frame(0, 1, 1, b"\0" * 5)
    answer = b""
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(10)
        end.connect(str(path))
        end.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(1, 4, 1, block) + body)
        while b"grpc-status" not in answer and (more := end.recv(65536)):
            answer += more
    return answer


def listening(session: int) -> set[tuple[str, int]]:
    """Where a server's processes accept TCP connections, or receive UDP."""
    links = [link for pid in procs.session_pids(session) for link in Path(f"/proc/{pid}/fd").iterdir()]
    owned = {os.readlink(link) for link in links if link.is_symlink()}
    found = set()
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in owned:
                host, _, port = fields[1].partition(":")
                packed = b"".join(bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8))
                address = ipaddress.ip_address(packed)
                mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
                found.add((str(mapped or address), int(port, 16)))
    return found


def test_nothing_listens_but_what_is_meant_to(served: Served) -> None:
    assert listening(served.services["unix"].pid) == set()
    for bind, address in (("loopback", "127.0.0.1"), ("network", network.node_address())):
        port = int(served.url(bind).rpartition(":")[2])
        assert listening(served.services[bind].pid) == {(address, port)}


def test_no_key_is_in_a_command_line_or_a_log_or_a_file_that_others_can_read(served: Served) -> None:
    lines = [(served.certificates / f"{role}.key").read_text().splitlines()[1:-1] for role in ("server", "client")]
    secrets = [line.encode() for line in (*lines[0], *lines[1])]
    assert len(secrets) >= 4
    holders = {path for path in served.run.root.rglob("*") if path.is_file() and contains(path, secrets)}
    assert holders == {served.certificates / "server.key", served.certificates / "client.key"}
    assert {path.name for path in holders if path.stat().st_mode & 0o077} == set()
    commands = [Path(f"/proc/{pid}/cmdline") for each in served.services.values() for pid in session(each)]
    assert len(commands) >= 2 * len(BINDS)
    assert not any(contains(path, secrets) for path in commands)


def session(published: endpoint.Endpoint) -> list[int]:
    return procs.session_pids(published.pid)


def contains(path: Path, secrets: list[bytes]) -> bool:
    content = path.read_bytes()
    return any(secret in content for secret in secrets)


def test_what_a_server_makes_is_its_users_alone(served: Served) -> None:
    for service in served.services.values():
        assert {path.stat().st_mode & 0o777 for path in regions_of(service)} == {0o600}
    assert served.socket.stat().st_mode & 0o777 == 0o700
    assert served.socket.parent.stat().st_mode & 0o777 == 0o700
    code = served.store / MODEL / "1"
    cached = {path.name for path in code.rglob("*.pyc")}  # which its Python keeps beside the code, and runs next time
    assert {name.partition(".")[0] for name in cached} == {"model", "scoring", "cuts"}
    assert [path for path in served.store.rglob("*") if path.stat().st_mode & 0o022] == []
    assert [(code / name).stat().st_mode & 0o222 for name in ("model.py", "scoring.py", "cuts.py")] == [0, 0, 0]


def test_proxies_in_the_environment_change_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for service in served.services.values():
        assert f"https_proxy={PROXY}" in Path(f"/proc/{service.pid}/environ").read_text().split("\0")
    answer = served.manifest.known_answers[0]
    for bind in BINDS:
        place = Place(served.address(bind))
        scorer = TritonScorer(lambda place=place: [place], serving_config().serving, connect_s=5)  # type: ignore[misc]
        assert scorer.score([answer.tokens]) == pytest.approx([answer.reward], abs=served.manifest.answer_tolerance)
        scorer.close()


def test_a_port_that_is_taken_before_or_while_the_model_loads_is_changed_for_another(
    engine: Engine, served: Served, tmp_path: Path
) -> None:
    (tmp_path / "store" / MODEL / "1").mkdir(parents=True)
    shutil.copy(served.store / MODEL / "config.pbtxt", tmp_path / "store" / MODEL)
    (tmp_path / "store" / MODEL / "1" / "model.py").write_text(NOTHING)  # it loads in a moment
    spec = make_spec(serving_config(bind="loopback").serving, tmp_path / "store", [], served.certificates)
    server = TritonServer(engine, spec, MODEL, tmp_path / "log", os.environ)
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        taken = {occupy(stack, spec.grpc_port)}
        server.start()
        taken.add(occupy(stack, server.spec.grpc_port))  # Triton binds once its model is loaded
        server.wait_ready(time.monotonic() + 120)
        assert len(taken) == 2
        assert server.spec.grpc_port not in taken
        assert server.address.url == f"127.0.0.1:{server.spec.grpc_port}"


NOTHING = """
class TritonPythonModel:
    def execute(self, requests): ...
"""


def occupy(stack: contextlib.ExitStack, port: int) -> int:
    holder = stack.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", port))
    holder.listen()
    return port
