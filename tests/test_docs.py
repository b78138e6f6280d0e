"""The documentation says what the code says: links, names, commands and settings that it mentions exist."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

from pipeline.config.reference import render_reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
DEFINITION = re.compile(r"([\w./-]+\.py): ([A-Za-z_][\w.]*)")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
COMMAND = re.compile(r"python3? -m (pipeline[\w.]*)")
SETTING = re.compile(r"--set ([a-z_][\w.]*)=")
FORBIDDEN = re.compile(r"(?<![\w.~-])/(?:root|home/\w+|mnt)\b", re.IGNORECASE)
FOLDERS = ("pipeline/", "tests/", "docs/", "slurm/", "containers/", "model_store_templates/", "benchmarks/")
SUFFIXES = (".py", ".json", ".jsonl", ".yaml", ".safetensors", ".gz", ".log")


def spans(page: Path) -> list[str]:
    """What a page sets in backticks on one line."""
    return SPAN.findall(page.read_text("utf-8"))


@lru_cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes and module-level names that a file defines; methods as Class.method."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text("utf-8")).body, "")
    return frozenset(names)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    broken = []
    for link in LINK.findall(SPAN.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue  # the web's links are not ours to keep
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{page.name}: these links lead nowhere: {broken}"


@each_page
def test_named_code_exists(page: Path) -> None:
    missing = []
    for span in spans(page):
        if match := DEFINITION.fullmatch(span):
            path = ROOT / match[1]
            if not path.is_file() or match[2] not in definitions(path):
                missing.append(span)
    assert not missing, f"{page.name}: no such function or class: {missing}"


@each_page
def test_named_tests_exist(page: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in TEST.findall(page.read_text("utf-8"))
        if not (ROOT / file).is_file() or name not in definitions(ROOT / file)
    ]
    assert not missing, f"{page.name}: no such test: {missing}"


@each_page
def test_named_files_exist(page: Path) -> None:
    paths = [span for span in spans(page) if span.startswith(FOLDERS) and re.fullmatch(r"[\w./*-]+", span)]
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing, f"{page.name}: no such file: {missing}"


@each_page
def test_named_commands_exist(page: Path) -> None:
    modules = set(COMMAND.findall(page.read_text("utf-8")))
    missing = [module for module in modules if not _is_command(module.rstrip("."))]
    assert not missing, f"{page.name}: no such command: python -m {', '.join(missing)}"


def _is_command(module: str) -> bool:
    """Whether `python -m module` does something; looked up without importing what is heavy."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return file.is_file() and '__name__ == "__main__"' in file.read_text("utf-8")


@each_page
def test_named_settings_exist(page: Path) -> None:
    known = set(re.findall(r"^\| `([\w.]+)` \|", render_reference(), flags=re.MULTILINE))
    sections = {key.split(".")[0] for key in known if "." in key}
    named = set(SETTING.findall(page.read_text("utf-8"))) - {"section.key"}
    for span in spans(page):
        match = re.match(r"([a-z_]+(?:\.[a-z_]+)+)", span)
        if match and span.split(".")[0] in sections:
            named.add(match[1])
    named = {key for key in named if not key.endswith(SUFFIXES)}
    unknown = {key for key in named if key not in known and not any(each.startswith(f"{key}.") for each in known)}
    assert not unknown, f"{page.name}: no such setting: {sorted(unknown)}"


def test_the_settings_reference_is_the_schemas() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    _, begin, rest = text.partition("<!-- settings -->\n")
    shown, end, _ = rest.partition("<!-- /settings -->")
    assert begin and end, "docs/configuration.md: needs the markers <!-- settings --> and <!-- /settings -->"
    assert shown.strip() == render_reference().strip(), (
        "docs/configuration.md is not what the schema says; put the output of `python -m pipeline.config.reference` "
        "between <!-- settings --> and <!-- /settings -->"
    )


@each_page
def test_nothing_of_the_machine_it_was_written_on(page: Path) -> None:
    found = [line for line in page.read_text("utf-8").splitlines() if FORBIDDEN.search(line)]
    assert not found, f"{page.name}: paths or addresses of one machine: {found}"


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) [b](#nowhere) `pipeline/errors.py: Nobody` `tests/test_docs.py::test_nothing`\n"
        "`pipeline/nowhere.py` `ppo.lambda: 1` python -m pipeline.nowhere see /home/someone/x\n"
    )
    for check in (
        test_links_lead_somewhere,
        test_named_code_exists,
        test_named_tests_exist,
        test_named_files_exist,
        test_named_commands_exist,
        test_named_settings_exist,
        test_nothing_of_the_machine_it_was_written_on,
    ):
        with pytest.raises(AssertionError):
            check(page)
