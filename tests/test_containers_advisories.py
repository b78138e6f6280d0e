"""Which holes of Triton are known, by release, and where a person is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import check
from pipeline.containers import advisories
from pipeline.resources import resource_dir
from pipeline.site import engine, images
from pipeline.site.engine import EngineFacts
from pipeline.stages.sandbox import Sandbox


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("2.25.0", (22, 8)),
        ("2.29.0", (22, 12)),
        ("2.30.0", (23, 1)),
        ("2.51.0", (24, 10)),
        ("2.53.0", (24, 12)),
        ("2.59.0", (25, 6)),
        ("2.59.1", (25, 7)),
        ("2.60.0", (25, 8)),
        ("2.71.0", (26, 7)),
        ("2.75.0", (26, 11)),
        ("unknown", None),
        ("", None),
    ],
)
def test_a_servers_version_tells_its_release(version: str, release: tuple[int, int] | None) -> None:
    assert advisories.release_of(version) == release


def test_each_release_lacks_the_fixes_that_came_after_it() -> None:
    assert advisories.missing_fixes((22, 8)) == advisories.missing_fixes((25, 6)) == advisories.BULLETINS
    assert [bulletin.number for bulletin in advisories.missing_fixes((26, 5))] == [5865, 5875]
    assert advisories.missing_fixes((26, 7)) == ()
    fixed = [bulletin.fixed for bulletin in advisories.BULLETINS]
    assert fixed == sorted(set(fixed))


def test_the_warning_is_one_line_and_names_the_release_that_is_safe() -> None:
    line = advisories.warning((24, 10))
    assert line is not None
    assert line.startswith("Triton 24.10 has known holes (11 of NVIDIA's security bulletins, fixed by 26.07)")
    assert "\n" not in line
    assert advisories.warning((26, 8)) is None
    assert advisories.warning(None) is None


def test_the_default_image_has_no_known_holes() -> None:
    release = images.release_of(check({}).sandbox.image)
    assert release is not None
    assert advisories.missing_fixes(release) == ()


@pytest.mark.parametrize(
    ("sandbox", "told"),
    [
        ({"engine": "venv"}, "Triton 24.10 has known holes"),
        (
            {"engine": "docker", "image": "docker://nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3"},
            "Triton 22.08 has",
        ),
        ({"engine": "docker"}, None),
        ({"engine": "docker", "image": "docker://site/own:1"}, None),
    ],
)
def test_the_doctor_says_so_before_anything_is_fetched(sandbox: dict[str, str], told: str | None) -> None:
    findings = engine.judge(EngineFacts(libc="glibc 2.36"), check({"sandbox": sandbox}))
    lines = [finding.what for finding in findings if "known holes" in finding.what]
    assert len(lines) == (0 if told is None else 1)
    assert told is None or lines[0].startswith(told)


def test_the_status_says_so_too() -> None:
    old = Sandbox().headline({"engine": "venv", "tritonserver": "2.51.0"})
    assert old == "tritonserver 2.51.0, with known holes (venv, found in the cache)"
    new = Sandbox().headline({"engine": "apptainer", "tritonserver": "2.72.0", "digest": "sha256:" + "0" * 64})
    assert "holes" not in new
    assert "holes" not in Sandbox().headline({"engine": "apptainer", "tritonserver": "unknown"})


def test_the_documentation_lists_every_bulletin() -> None:
    docs = Path(resource_dir("model_store_templates")).parent / "docs" / "reward-serving.md"
    text = docs.read_text("utf-8")
    for bulletin in advisories.BULLETINS:
        assert f"| {advisories.text(bulletin.fixed)} | {bulletin.number} |" in text
