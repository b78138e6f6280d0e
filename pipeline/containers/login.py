"""What a registry is told of its user: the logins that container engines keep, and their switch for plain HTTP."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from pipeline.run import atomic

LOGIN_REMEDY = "log in with `apptainer registry login` or `docker login`, or correct sandbox.image"


def credentials(host: str, environ: Mapping[str, str]) -> str | None:
    """base64(user:password) for a registry: from Apptainer's variables, or the files that `login` commands write."""
    for prefix in ("APPTAINER", "SINGULARITY"):
        user, password = environ.get(f"{prefix}_DOCKER_USERNAME"), environ.get(f"{prefix}_DOCKER_PASSWORD")
        if user and password:
            return base64.b64encode(f"{user}:{password}".encode()).decode()
    home = Path(environ.get("HOME", "/"))
    for file in (
        home / ".apptainer/docker-config.json",
        home / ".singularity/docker-config.json",
        home / ".docker/config.json",
    ):
        known = (atomic.read_json(file) or {}).get("auths") or {}
        for name in (host, f"https://{host}", f"https://index.{host}/v1/"):
            if known.get(name, {}).get("auth"):
                return str(known[name]["auth"])
    return None


def is_true(text: str) -> bool:
    """How Apptainer reads a variable that switches something."""
    return text.strip().lower() in ("1", "t", "true", "yes", "on")
