"""A small image like NVIDIA's tritonserver, made on the spot: Debian's Python, and the server of a wheel.

It is laid out as NVIDIA's is, but holds one backend (Python), no CUDA, and neither torch nor transformers: the plain
images have neither. Made in about 15 s, once for each content, and kept in the user's cache.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pipeline.run.hashing import fingerprint
from pipeline.serving.environment import NUMPY, SERVER_VERSION, SERVER_WHEEL

NAME = "nvidia/tritonserver:22.08-pyt-python-py3"
PROGRAMS = ("mmdebstrap", "skopeo", "apt-get")
PYTHON = "3.11"  # that of the Debian release below
RELEASE = "bookworm"
PACKAGES = (
    *("base-files", "bash", "coreutils", "dash", "findutils", "grep", "sed", "libc-bin", "mount", "util-linux"),
    *("libstdc++6", f"libpython{PYTHON}", "python3", "python3-pip", "procps"),
)
# The packages are never configured: what their scripts would have made and is needed here. Hooks must keep away from
# "$1"/dev: the machine's own /dev/shm is mounted there while they run.
HOOKS = (
    """printf 'root:x:0:0:root:/root:/bin/bash\\nnobody:x:65534:65534::/:/bin/false\\n' >"$1/etc/passwd" """,
    """printf 'root:x:0:\\nnogroup:x:65534:\\n' >"$1/etc/group" """,
    """rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/locale "$1"/usr/lib/python3*/EXTERNALLY-MANAGED""",
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
SERVER = "/opt/tritonserver"
ENTRYPOINT = "/opt/nvidia/nvidia_entrypoint.sh"
ENVIRONMENT = {
    "PATH": f"{SERVER}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_LIBRARY_PATH": f"{SERVER}/lib",
    "TRITON_SERVER_VERSION": SERVER_VERSION,
    "NVIDIA_TRITON_SERVER_VERSION": "22.08",
}
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def missing_programs() -> list[str]:
    """The programs that are not installed; without them no image is made."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def image_layout() -> Path:
    """The OCI layout of the image, out of the cache or made now."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = fingerprint([recipe, SERVER_WHEEL, NUMPY, hashlib.sha256(CERTIFICATES.read_bytes()).hexdigest()])[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hh-pipeline-tests"
    final = cache / f"image-{key}"
    if not final.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as work:
            layout = _make(Path(work))
            try:
                layout.rename(final)
            except OSError:  # another process made it meanwhile
                assert final.exists()
    return final


def archive(layout: Path, kind: str, target: Path) -> Path:
    """The image as one file: `kind` is oci-archive or docker-archive."""
    argv = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{layout}", f"{kind}:{target}:{NAME}"]
    subprocess.run(argv, check=True, timeout=300)
    return target


def _make(work: Path) -> Path:
    layout = work / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True)
    layers = [_compress(layout, tar) for tar in (_debian(work), _triton(work))]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": [f"{key}={value}" for key, value in ENVIRONMENT.items()],
            "Entrypoint": [ENTRYPOINT],
            "WorkingDir": SERVER,
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _blob(layout, config, "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor for _, descriptor in layers],
    }
    entry = _blob(layout, manifest, manifest["mediaType"])
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return layout


def _debian(work: Path) -> Path:
    """The base, from this machine's mirror: packages only unpacked, which takes 5 s, where debootstrap takes 45."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)", "Created-By: Packages"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    prefix = "Debian|Debian|main|"
    mirrors = [line.removeprefix(prefix) for line in found.stdout.splitlines() if line.startswith(prefix)]
    assert mirrors, "apt's sources name no mirror of Debian's main archive; run: apt-get update"
    argv = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}"]
    argv += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    argv += [f"--extract-hook={hook}" for hook in HOOKS]
    target = work / "debian.tar"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0"}
    subprocess.run([*argv, RELEASE, str(target), mirrors[0]], check=True, env=environment, timeout=600)
    return target


def _triton(work: Path) -> Path:
    """The server, laid out as in NVIDIA's image, with numpy for the image's own Python."""
    wheels = work / "wheels"
    argv = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}"]
    argv += ["--disable-pip-version-check", f"--dest={wheels}", SERVER_WHEEL, NUMPY]
    subprocess.run([sys.executable, *argv], check=True, timeout=600)
    unpacked = {}
    for name in ("numpy", "nvidia_pytriton"):
        (wheel,) = wheels.glob(f"{name}-*.whl")
        unpacked[name] = work / name
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked[name])
    server = unpacked["nvidia_pytriton"] / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    entrypoint = work / "entrypoint.sh"
    entrypoint.write_text('#!/bin/bash\necho "=== Triton Inference Server, made for tests ==="\nexec "$@"\n')
    for program in (server / "bin" / "tritonserver", stub, entrypoint):
        program.chmod(0o755)
    target = work / "triton.tar"
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        contents = {
            f"{SERVER}/bin/tritonserver": server / "bin" / "tritonserver",
            f"{SERVER}/lib": unpacked["nvidia_pytriton"] / "nvidia_pytriton.libs",
            f"{SERVER}/backends/python/triton_python_backend_stub": stub,
            f"/usr/local/lib/python{PYTHON}/dist-packages": unpacked["numpy"],
            "/etc/ssl/certs/ca-certificates.crt": CERTIFICATES.resolve(),
            ENTRYPOINT: entrypoint,
        }
        backend = (path for path in sorted((server / "backends" / "python").iterdir()) if path.is_file())
        contents |= {f"{SERVER}/backends/python/{path.name}": path for path in backend}
        for name, source in contents.items():
            tar.add(source, name.lstrip("/"), filter=_as_root)
    return target


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = 0
    entry.mode |= 0o755 if entry.isdir() else 0o644
    return entry


def _compress(layout: Path, tar: Path) -> tuple[str, dict[str, Any]]:
    """Store a layer: its digest before compression, and its descriptor."""
    plain = hashlib.sha256()
    packed = tar.with_suffix(".tar.gz")
    with tar.open("rb") as source, packed.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as target:
        while chunk := source.read(1 << 20):
            plain.update(chunk)
            target.write(chunk)
    digest = _digest(packed)
    descriptor = {"mediaType": LAYER, "digest": f"sha256:{digest}", "size": packed.stat().st_size}
    packed.rename(layout / "blobs" / "sha256" / digest)
    return f"sha256:{plain.hexdigest()}", descriptor


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stored:
        while chunk := stored.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _blob(layout: Path, content: dict[str, Any], media_type: str) -> dict[str, Any]:
    data = json.dumps(content).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
