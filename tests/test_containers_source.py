"""The forms of sandbox.image, and what identifies an image's content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipeline.containers.registry import parse_reference
from pipeline.containers.source import content_digest, parse_source
from pipeline.errors import UserError

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("name", "host", "repository", "tag", "digest"),
    [
        ("docker://nvcr.io/nvidia/tritonserver:22.08-py3", "nvcr.io", "nvidia/tritonserver", "22.08-py3", None),
        ("docker://127.0.0.1:5000/a/b:1", "127.0.0.1:5000", "a/b", "1", None),
        ("docker://localhost/a@" + DIGEST, "localhost", "a", None, DIGEST),
        ("docker://nvcr.io/a/b:1@" + DIGEST, "nvcr.io", "a/b", "1", DIGEST),
        ("docker://debian:12", "docker.io", "library/debian", "12", None),
        ("docker://me/image", "docker.io", "me/image", None, None),
    ],
)
def test_names_are_read_as_docker_reads_them(
    name: str, host: str, repository: str, tag: str | None, digest: str | None
) -> None:
    reference = parse_reference(name)
    assert (reference.host, reference.repository, reference.tag, reference.digest) == (host, repository, tag, digest)


def test_a_digest_wins_over_a_tag_and_no_tag_is_latest() -> None:
    assert parse_reference("docker://nvcr.io/a/b:1@" + DIGEST).wanted == DIGEST
    assert parse_reference("docker://me/image").wanted == "latest"


@pytest.mark.parametrize("name", ["docker://", "docker://a b", "docker://host/name:", "docker://host/name@sha256:12"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"sandbox\.image: .*not an image's name; expected docker://host/name:tag"):
        parse_source(name)


def test_files_are_told_apart_and_must_be_there(tmp_path: Path) -> None:
    for name in ("a.sif", "b.def", "c.tar"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    assert parse_source(str(tmp_path / "a.sif")).kind == "sif"
    assert parse_source(str(tmp_path / "b.def")).kind == "definition"
    assert parse_source(str(tmp_path / "folder")).kind == "folder"
    archive = parse_source(f"oci-archive:{tmp_path}/c.tar")
    assert (archive.kind, archive.text) == ("archive", f"oci-archive:{tmp_path}/c.tar")
    with pytest.raises(UserError, match=rf"archives are written oci-archive:{tmp_path}/c\.tar"):
        parse_source(str(tmp_path / "c.tar"))
    with pytest.raises(UserError, match=r"gone\.sif: no such file"):
        parse_source(str(tmp_path / "gone.sif"))
    with pytest.raises(UserError, match=r"nvcr: not an image; give docker://"):
        parse_source("nvcr")


def test_an_archive_is_known_by_its_content_and_a_folder_by_names_and_sizes(tmp_path: Path) -> None:
    archive = tmp_path / "c.tar"
    archive.write_bytes(b"layers")
    assert content_digest(parse_source(f"docker-archive:{archive}")) == hashlib.sha256(b"layers").hexdigest()
    folder = tmp_path / "sandbox"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "sh").write_text("x")
    (folder / "bin" / "bash").symlink_to("/bin/nowhere")  # an image's links lead into the image
    before = content_digest(parse_source(str(folder)))
    (folder / "bin" / "sh").write_text("xy")
    assert content_digest(parse_source(str(folder))) != before
    assert content_digest(parse_source("docker://nvcr.io/a/b:1")) is None
