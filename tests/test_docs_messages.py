"""The messages that the tables of docs/ quote are those that the code writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def texts(path: Path) -> list[str]:
    """The string literals of a module; what an f-string fills in is an ellipsis."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def missing(page: str, messages: str) -> list[str]:
    """Quoted messages (the first column of the tables) of which some part is in no message of the code."""
    quotes = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert quotes
    parts = {
        quote: [part.strip(" :;.,?=") for part in re.split(r"…|\d+|['():]|TRITON_HOST", quote)] for quote in quotes
    }
    return [quote for quote in quotes if not all(part in messages for part in parts[quote])]


def test_quoted_messages_are_the_codes() -> None:
    messages = "\n".join(text for path in sorted((ROOT / "pipeline").rglob("*.py")) for text in texts(path))
    for name in ("troubleshooting.md", "doctor.md", "clusters.md", "containers.md"):
        assert missing((ROOT / "docs" / name).read_text("utf-8"), messages) == []
    assert missing("| `TRITON_HOST …: the server keeps silent` | x |", messages)  # which no code says
