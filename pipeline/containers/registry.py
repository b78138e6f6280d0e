"""Fetches a container image from a registry without a container engine: by digest, resumable, every byte checked.

What a login node should do, and no more: nothing is unpacked. The result is an OCI layout (OCI image specification 1.1)
from which Apptainer and Singularity build without a network (`oci:FOLDER`). Protocol: OCI distribution specification.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import platform
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.containers.login import LOGIN_REMEDY, credentials, is_true
from pipeline.errors import UserError
from pipeline.run import atomic, hashing

_REFERENCE = re.compile(
    r"(?P<path>[\w.-]+(?::\d+(?=/))?(?:/[\w.-]+)*?)(?::(?P<tag>[\w][\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CHUNK = 1 << 20
_TIMEOUT_S = 60.0
_TRIES = 4
_PAUSE_S = 1.0
_STREAMS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """An image's name: registry host, repository, and a tag or digest."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def wanted(self) -> str:
        """What the registry is asked for: the digest where there is one, else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}" + (f"@{self.digest}" if self.digest else f":{self.wanted}")


def parse_reference(text: str) -> Reference:
    """Parse "docker://host/name:tag" or "...@sha256:..."; as docker does, a name without a host is Docker Hub's."""
    match = _REFERENCE.fullmatch(text.removeprefix("docker://"))
    if match is None:
        raise UserError(
            f"sandbox.image: {text}: not an image's name; expected docker://host/name:tag or @sha256:digest"
        )
    host, slash, repository = match["path"].partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, repository = "docker.io", match["path"] if slash else f"library/{match['path']}"
    return Reference(host, repository, match["tag"], match["digest"])


@dataclass(frozen=True)
class Blob:
    """A file of an image: what the manifest says of it."""

    digest: str
    size: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", self.digest):  # it becomes a file's name
            raise ValueError(f"{self.digest[:80]!r} is no digest")

    def path(self, layout: Path) -> Path:
        """Where it is in an OCI layout."""
        return layout / "blobs" / "sha256" / self.digest.removeprefix("sha256:")


class BadDownload(OSError):
    """A file of an image did not arrive whole."""


class Registry:
    """The images of one registry host, asked as its API wants to be asked."""

    def __init__(self, reference: Reference, environ: Mapping[str, str] = os.environ) -> None:
        self.reference = reference
        self._authorization: str | None = None
        plain = any(is_true(environ.get(name, "")) for name in ("APPTAINER_NOHTTPS", "SINGULARITY_NOHTTPS"))
        host = "registry-1.docker.io" if reference.host == "docker.io" else reference.host
        self._base = f"{'http' if plain else 'https'}://{host}/v2/{reference.repository}"
        self._login = credentials(reference.host, environ)
        self._opener = urllib.request.build_opener(_SafeRedirects)

    def digest(self) -> str:
        """The digest that the tag stands for now."""
        with self._open(f"manifests/{self.reference.wanted}", (*_INDEXES, *_MANIFESTS)) as reply:
            data = reply.read()
        _parse(data)  # a proxy's page of welcome must not be taken for an image
        return _digest_of(data)

    def manifest(self, digest: str) -> tuple[bytes, dict[str, Any]]:
        """A manifest or index, as bytes that have this digest, and parsed."""
        with self._open(f"manifests/{digest}", (*_INDEXES, *_MANIFESTS)) as reply:
            data = reply.read()
        if _digest_of(data) != digest:
            raise UserError(f"{self.reference}: the registry's answer does not have the digest {digest}; try again")
        return data, _parse(data)

    def fetch(self, blob: Blob, layout: Path) -> None:
        """Fetch a blob into the layout unless it is there, going on where an interrupted fetch stopped."""
        target = blob.path(layout)
        if target.exists():
            return
        part = target.with_name(f"{target.name}.part")
        for attempt in range(_TRIES):
            try:
                self._download(blob, part)
                break
            # A full disk is none of these: that is a UserError by now.
            except (OSError, http.client.HTTPException) as error:
                if attempt + 1 == _TRIES:
                    raise
                logger.warning("%s: %s; going on from there", blob.digest[:19], error)
                time.sleep(_PAUSE_S * 2**attempt)
        os.replace(part, target)

    def _download(self, blob: Blob, part: Path) -> None:
        with atomic.disk_errors(part):
            have = part.stat().st_size if part.exists() else 0
            if have < blob.size:
                headers = {"Range": f"bytes={have}-"} if have else {}
                with self._open(f"blobs/{blob.digest}", (), headers) as reply:
                    resumed = getattr(reply, "status", 200) == 206
                    with part.open("ab" if resumed else "wb") as file:
                        while chunk := reply.read(_CHUNK):
                            file.write(chunk)
                        file.flush()
                        os.fsync(file.fileno())
            size = part.stat().st_size
            if size < blob.size:
                raise BadDownload(f"the connection ended after {size} of {blob.size} bytes")
            if f"sha256:{hashing.sha256_file(part)}" != blob.digest:
                part.unlink()
                raise BadDownload(f"what arrived is not {blob.digest[:19]}")

    def _open(self, path: str, accept: tuple[str, ...], headers: Mapping[str, str] | None = None) -> Any:
        """Ask once; where the registry wants a token, get one and ask again."""
        url = f"{self._base}/{path}"
        for last in (False, True):
            request = urllib.request.Request(url, headers={**(headers or {}), "Accept": ", ".join(accept) or "*/*"})
            if self._authorization:
                request.add_unredirected_header("Authorization", self._authorization)
            try:
                return self._opener.open(request, timeout=_TIMEOUT_S)
            except urllib.error.HTTPError as error:
                if error.code == 401 and not last:
                    self._authorization = self._authorize(error.headers.get("WWW-Authenticate", ""))
                    continue
                raise
        raise AssertionError("unreachable")

    def _authorize(self, challenge: str) -> str:
        """The Authorization header that a challenge asks for: an anonymous or logged-in token, or the login itself."""
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic" and self._login:
            return f"Basic {self._login}"
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if scheme.lower() != "bearer" or "realm" not in fields:
            raise UserError(f"{self.reference}: the registry asks for a login; {LOGIN_REMEDY}")
        query = {key: fields[key] for key in ("service", "scope") if key in fields}
        query.setdefault("scope", f"repository:{self.reference.repository}:pull")
        request = urllib.request.Request(f"{fields['realm']}?{urllib.parse.urlencode(query)}")
        if self._login:
            request.add_unredirected_header("Authorization", f"Basic {self._login}")
        with self._opener.open(request, timeout=_TIMEOUT_S) as reply:
            token = json.load(reply)
        return f"Bearer {token.get('token') or token['access_token']}"


def resolve(reference: Reference) -> str:
    """The digest of the image that a name stands for now. UserError when the registry does not say."""
    if reference.digest:
        return reference.digest
    found: str = _asking(reference, lambda registry: registry.digest())
    return found


def fetch(reference: Reference, digest: str, layout: Path, note: Callable[[str], None]) -> None:
    """Fetch the image with this digest into the folder `layout`, an OCI layout for this machine's architecture.

    What an interrupted call left in the folder is used. UserError when the registry or the disk fails.
    """
    _asking(reference, lambda registry: _fetch(registry, digest, layout, note))


def _fetch(registry: Registry, digest: str, layout: Path, note: Callable[[str], None]) -> None:
    data, manifest = registry.manifest(digest)
    if manifest.get("mediaType") in _INDEXES or "manifests" in manifest:
        data, manifest = registry.manifest(_for_this_machine(registry.reference, manifest))
    blobs = [Blob(one["digest"], one["size"]) for one in (manifest["config"], *manifest["layers"])]
    own = Blob(_digest_of(data), len(data))
    own.path(layout).parent.mkdir(parents=True, exist_ok=True)
    wanted = {blob.digest: blob for blob in blobs}.values()  # an empty layer may stand there twice
    total = sum(blob.size for blob in wanted)
    note(f"fetching {registry.reference} ({total / 1e9:.1f} GB in {len(wanted)} files)")
    with ThreadPoolExecutor(_STREAMS) as pool:
        for done in [pool.submit(registry.fetch, blob, layout) for blob in wanted]:
            done.result()
    atomic.write_bytes(own.path(layout), data)
    descriptor = {
        "mediaType": manifest.get("mediaType", _MANIFESTS[0]),
        "digest": own.digest,
        "size": own.size,
        "annotations": {"org.opencontainers.image.ref.name": "image"},
    }
    atomic.write_json(layout / "oci-layout", {"imageLayoutVersion": "1.0.0"})
    atomic.write_json(layout / "index.json", {"schemaVersion": 2, "manifests": [descriptor]})  # last: it is complete


def _for_this_machine(reference: Reference, index: Mapping[str, Any]) -> str:
    architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
    offered = []
    for one in index["manifests"]:
        where = one.get("platform", {})
        if (where.get("os"), where.get("architecture")) == ("linux", architecture):
            return str(one["digest"])
        offered.append(f"{where.get('os')}/{where.get('architecture')}")
    raise UserError(
        f"{reference}: has no image for linux/{architecture}, only for {', '.join(offered)}; choose another"
    )


def _asking(reference: Reference, ask: Callable[[Registry], Any]) -> Any:
    """Turn what may go wrong with a registry into one line."""
    try:
        return ask(Registry(reference))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(f"{reference}: the registry refuses access ({error.code}); {LOGIN_REMEDY}") from error
        if error.code == 404:
            raise UserError(f"{reference}: no such image; look the tag up in the registry's catalogue") from error
        raise UserError(f"{reference}: the registry answers {error.code} {error.reason}; try again later") from error
    except BadDownload as error:
        raise UserError(f"{reference}: {error}; run it again, it goes on from there") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{reference}: what answers is no registry, or has an image of an old kind ({error}); is there a proxy in "
            "between?"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{reference}: the registry cannot be reached ({reason}); run this stage where the internet can be "
            "reached, set cluster.proxy, or take an image file (oci-archive:FILE)"
        ) from error


def _parse(data: bytes) -> dict[str, Any]:
    """A manifest or index; ValueError for anything else."""
    manifest = json.loads(data)
    if not isinstance(manifest, dict) or not ("manifests" in manifest or {"config", "layers"} <= manifest.keys()):
        raise ValueError("not an image's manifest")
    return manifest


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Blobs are kept elsewhere as a rule. Authorization is an unredirected header: it stays with its registry."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> Any:
        if newurl.startswith("http://") and req.full_url.startswith("https://"):
            raise urllib.error.URLError(f"redirected from https to {newurl.partition('?')[0]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
