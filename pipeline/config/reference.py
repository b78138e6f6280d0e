"""python -m pipeline.config.reference: every setting with type, default and meaning, as the Markdown of docs/.

The meanings are the docstrings below the fields in the schema's source, so there is one place to write them.
"""

from __future__ import annotations

import ast
import inspect
import json
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from pipeline.config import cluster, methods, schema, serving, training
from pipeline.errors import run_command


def render_reference() -> str:
    """All sections of the configuration as Markdown tables, in schema order."""
    lines: list[str] = []
    _render(schema.Config, "", lines)
    return "\n".join(lines).strip() + "\n"


def _render(section: type[BaseModel], prefix: str, lines: list[str]) -> None:
    meanings = _field_docstrings(section)
    rows, inner = [], []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            inner.append((annotation, f"{prefix}{name}."))
            continue
        default = field.get_default(call_default_factory=True)
        shown = json.dumps(default.model_dump() if isinstance(default, BaseModel) else default)
        rows.append(f"| `{prefix}{name}` | {_type(annotation)} | `{shown}` | {meanings.get(name, '')} |")
    summary = " ".join((section.__doc__ or "").split())
    heading = prefix.removesuffix(".") or "Top level"
    lines += [f"### {heading}", "", summary, ""]
    if rows:
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    for each, inner_prefix in inner:
        _render(each, inner_prefix, lines)


def _field_docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string literal behind each field, of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if base.__module__ not in {module.__name__ for module in (schema, methods, training, cluster, serving)}:
            continue
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[statement.target.id] = " ".join(str(following.value.value).split()).replace("|", "\\|")
    return found


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation))
    if origin is tuple:
        parts = [part for part in get_args(annotation) if part is not ...]
        return "list of " + _type(parts[0])
    if origin is dict:
        return "mapping"
    name: str = annotation.__name__
    return {"NoneType": "null", "str": "text"}.get(name, name)


if __name__ == "__main__":
    run_command(lambda: print(render_reference(), end=""))
