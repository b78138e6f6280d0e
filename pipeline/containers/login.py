"""What a registry is told of its user: the logins that container engines keep, and their switch for plain HTTP."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import atomic

LOGIN_REMEDY = "log in with `apptainer registry login` or `docker login`, or correct sandbox.image"
_HELPER_S = 30.0
_TOKEN_USER = "<token>"
"""What a helper calls the user where it holds a token for docker's own protocol in place of a password."""

logger = logging.getLogger(__name__)


def credentials(host: str, environ: Mapping[str, str]) -> str | None:
    """base64(user:password) for a registry: from Apptainer's variables, or what `login` commands keep in files and in
    the credential helpers that these name.
    """
    for prefix in ("APPTAINER", "SINGULARITY"):
        user, password = environ.get(f"{prefix}_DOCKER_USERNAME"), environ.get(f"{prefix}_DOCKER_PASSWORD")
        if user and password:
            return _encoded(user, password)
    for file in _files(environ):
        kept = atomic.read_json(file) or {}
        found = _helped(kept, host, environ) or _written(kept, host)
        if found is not None:
            return found
    return None


def is_true(text: str) -> bool:
    """How Apptainer reads a variable that switches something."""
    return text.strip().lower() in ("1", "t", "true", "yes", "on")


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ.get("HOME", "/"))
    yield home / ".apptainer/docker-config.json"
    yield home / ".singularity/docker-config.json"
    yield Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"


def _names(host: str) -> tuple[str, ...]:
    """What a registry may be called; Docker Hub by the last."""
    return host, f"https://{host}", f"https://index.{host}/v1/"


def _written(kept: Mapping[str, Any], host: str) -> str | None:
    """The login that stands in the file itself."""
    known = kept.get("auths") or {}
    return next((str(known[name]["auth"]) for name in _names(host) if known.get(name, {}).get("auth")), None)


def _helped(kept: Mapping[str, Any], host: str, environ: Mapping[str, str]) -> str | None:
    """The login that the file's credential helper has for the registry: its own, or the one for all."""
    own = kept.get("credHelpers") or {}
    helper = next((own[name] for name in _names(host) if name in own), kept.get("credsStore"))
    if not helper:
        return None
    answers = (_ask(str(helper), name, environ) for name in _names(host))
    return next((answer for answer in answers if answer is not None), None)


def _ask(helper: str, name: str, environ: Mapping[str, str]) -> str | None:
    """What `docker-credential-HELPER get` has under this name; None where that is nothing, or nothing of use."""
    command = f"docker-credential-{helper}"
    try:
        status, text = procs.capture([command, "get"], env=environ, timeout_s=_HELPER_S, told=name)
    except (UserError, OSError) as error:  # not there, silent, or not to be run
        logger.warning("%s", error)
        return None
    if status != 0:
        if "credentials not found" not in text.lower():
            logger.warning("%s get: %s", command, " ".join(text.split()))
        return None
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])  # warnings may stand around it
        user, secret = found["Username"], found["Secret"]
    except (ValueError, KeyError, TypeError):
        logger.warning("%s get: its answer for %s holds no login", command, name)  # which is not shown: a secret
        return None
    if not user or not secret:
        return None
    if user == _TOKEN_USER:
        logger.warning("%s: it has a token for %s, and no password; log in with a password", command, name)
        return None
    return _encoded(user, secret)


def _encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()
