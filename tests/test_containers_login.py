"""Logins of registries, as container engines keep them: in files, and in the helper programs that these name."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from pipeline.containers.login import credentials

HELPER = """#!/bin/sh
read server
echo "$1 $server" >> "{folder}/asked"
echo "warning: the keyring is old" >&2
case "$server" in
    nvcr.io) echo '{{"ServerURL": "nvcr.io", "Username": "$oauthtoken", "Secret": "pa:ss"}}';;
    https://index.docker.io/v1/) echo '{{"Username": "me", "Secret": "hub"}}';;
    token.io) echo '{{"Username": "<token>", "Secret": "s3cret"}}';;
    odd.io) echo 'Secret: s3cret';;
    broken.io) echo "the keyring is locked"; exit 1;;
    *) echo "credentials not found in native keychain"; exit 1;;
esac
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A home folder, and a helper "site" on PATH."""
    (tmp_path / "bin").mkdir()
    helper = tmp_path / "bin" / "docker-credential-site"
    helper.write_text(HELPER.format(folder=tmp_path))
    helper.chmod(0o755)
    return {"HOME": str(tmp_path), "PATH": f"{helper.parent}:{os.environ['PATH']}"}


def keep(environ: dict[str, str], folder: str = ".docker", **content: object) -> None:
    path = Path(environ["HOME"]) / folder / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def login(host: str, environ: dict[str, str]) -> str | None:
    found = credentials(host, environ)
    return base64.b64decode(found).decode() if found is not None else None


def written(login: str) -> dict[str, str]:
    return {"auth": base64.b64encode(login.encode()).decode()}


def test_a_helper_for_one_registry_is_asked_for_that_one_only(environ: dict[str, str], tmp_path: Path) -> None:
    keep(environ, credHelpers={"nvcr.io": "site"}, auths={"quay.io": written("a:b")})
    assert login("nvcr.io", environ) == "$oauthtoken:pa:ss"
    assert login("quay.io", environ) == "a:b"
    assert (tmp_path / "asked").read_text() == "get nvcr.io\n"


def test_a_helper_for_all_is_asked_first_and_what_it_lacks_is_looked_for_in_the_file(environ: dict[str, str]) -> None:
    keep(environ, credsStore="site", auths={"nvcr.io": {}, "quay.io": written("a:b")})
    assert login("nvcr.io", environ) == "$oauthtoken:pa:ss"
    assert login("docker.io", environ) == "me:hub"
    assert login("quay.io", environ) == "a:b"
    assert login("nowhere.io", environ) is None


def test_the_configuration_may_lie_elsewhere(environ: dict[str, str], tmp_path: Path) -> None:
    keep(environ, "elsewhere", credsStore="site")
    assert login("nvcr.io", environ) is None
    assert login("nvcr.io", {**environ, "DOCKER_CONFIG": str(tmp_path / "elsewhere")}) == "$oauthtoken:pa:ss"


@pytest.mark.parametrize(
    ("helper", "host", "said"),
    [
        ("site", "broken.io", "docker-credential-site get: warning: the keyring is old the keyring is locked"),
        ("site", "token.io", "it has a token for token.io, and no password"),
        ("site", "odd.io", "its answer for odd.io holds no login"),
        ("gone", "nvcr.io", "docker-credential-gone: command not found"),
    ],
)
def test_a_helper_that_does_not_help_is_named_and_its_secret_is_not(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture, helper: str, host: str, said: str
) -> None:
    keep(environ, credHelpers={host: helper}, auths={host: written("a:b")})
    assert login(host, environ) == "a:b"
    assert said in caplog.text
    assert "s3cret" not in caplog.text


def test_what_has_no_login_is_no_error_and_the_environment_comes_first(environ: dict[str, str]) -> None:
    assert login("nvcr.io", environ) is None
    keep(environ, credsStore="site")
    own = {"APPTAINER_DOCKER_USERNAME": "u", "APPTAINER_DOCKER_PASSWORD": "p"}
    assert login("nvcr.io", {**environ, **own}) == "u:p"
