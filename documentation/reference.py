"""docs/reference/: every field of a config from the pydantic models, every option from the parser. `make docs` writes them anew.

python -m documentation.reference
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

from distmtl.__main__ import parser
from distmtl.config import Config, Strict
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config.tuning import TuningConfig
from distmtl.serving.fusion import FUSION

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
Schema = dict[str, Any]  # JSON Schema


def pages() -> dict[str, str]:
    """File name → what it holds."""
    return {"config.md": config_page(), "commands.md": commands_page()}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- config


def config_page() -> str:
    page = ConfigPage()
    page.lines += [
        "# Config reference",
        "",
        "Every section and field of what `distmtl train`, `leaderboard`, `tune` and `serve --fusion` read, written from the code.",
        "Unknown keys are refused. `distmtl config my.yaml` prints a config with every default filled in. On the command line",
        "`section.key=value` overrides a field, of a list's element by its name: `tasks.click.weight=0.5`.",
        "",
    ]
    page.whole("A run", Config)
    page.whole("A leaderboard", LeaderboardConfig)
    page.whole("A search", TuningConfig)
    fusion = FUSION.json_schema(ref_template="{model}")
    page.models |= fusion["$defs"]
    page.field("fusion", fusion, level=2)
    return str(page)


class ConfigPage:
    """Lines of Markdown; a model that several fields may hold is described where the first of them is, the others lead there."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.models: dict[str, Schema] = {}
        self.places: dict[str, str] = {}  # model → heading to lead to

    def __str__(self) -> str:
        text = "\n".join(self.lines).rstrip() + "\n"
        return re.sub(r"\(@(\w+)\)", lambda link: f"(#{_slug(self.places[link[1]])})", text)

    def whole(self, title: str, model: type[Strict]) -> None:
        schema = model.model_json_schema(ref_template="{model}")
        self.lines += [f"## {title}", ""]
        self.model(schema, "", level=2)

    def model(self, schema: Schema, path: str, level: int) -> None:
        """What a model is for, a line for every field, and then what these hold."""
        self.models |= schema.get("$defs", {})
        if "description" in schema:
            self.lines += [_prose(schema["description"]), ""]
        fields = {name: field for name, field in schema["properties"].items() if name != "kind"}
        if fields:
            self.lines += ["| field | type | default | |", "|---|---|---|---|"]
        for name, field in fields.items():
            held, kind = _held(field), self.kind_of(field)
            default = "must be given" if name in schema.get("required", ()) else _default(field.get("default"))
            kind = f"[{kind}](@{held[0]})" if held else kind
            says = field.get("description") or self.models[held[0]]["description"]  # pydantic leaves out what the model says as well
            self.lines.append(f"| `{name}` | {kind} | {default} | {_cell(_prose(says))} |")
        self.lines.append("")
        for name, field in fields.items():
            self.field(f"{path}.{name}".lstrip("."), _inner(field), level + 1)

    def field(self, path: str, schema: Schema, level: int) -> None:
        """What a field holds, if that is one model or one of several kinds of them, and none that is described already."""
        new = [name for name in _held(schema) if name not in self.places]
        if not new:
            return
        self.places |= dict.fromkeys(new, path)
        self.lines += [f"{'#' * level} {path}", ""]
        if "$ref" in schema:
            self.model(self.models[new[0]], path, level)
            return
        kinds = {name: kind for kind, name in schema["discriminator"]["mapping"].items()}
        self.lines += [f"`kind`: {', '.join(f'`{kinds[name]}`' for name in _held(schema))}.", ""]
        for name in new:
            self.lines += [f"{'#' * (level + 1)} {path}: {kinds[name]}", ""]
            self.model(self.models[name], f"{path}: {kinds[name]}", level + 1)

    def kind_of(self, schema: Schema) -> str:
        """A type in words."""
        if "anyOf" in schema:
            return " or ".join(self.kind_of(s) for s in schema["anyOf"] if s.get("type") != "null")
        if "oneOf" in schema:
            return "section with a `kind`"
        if "$ref" in schema:
            return "section"
        if "enum" in schema or "const" in schema:
            return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
        kind = schema.get("type")
        if kind == "array":
            items = schema.get("prefixItems") or [schema["items"]]
            size = f" of {len(items)}" if "prefixItems" in schema else " (not empty)" if schema.get("minItems") else ""
            return f"list{size}: {' or '.join(dict.fromkeys(map(self.kind_of, items)))}"
        if kind == "object":
            return f"mapping{' (not empty)' if schema.get('minProperties') else ''}: {self.kind_of(_values(schema))}"
        words = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
        return words.get(str(kind), "anything") + _bounds(schema)


def _inner(schema: Schema) -> Schema:
    """What an optional field, a list or a mapping is made of."""
    if "anyOf" in schema:
        return _inner(next(s for s in schema["anyOf"] if s.get("type") != "null"))
    inner = schema.get("items") or _values(schema)
    return _inner(inner) if inner else schema


def _values(schema: Schema) -> Schema:
    """Of a mapping; nothing is known of those that may be anything."""
    inner = next(iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties"))
    return inner if isinstance(inner, dict) else {}


def _held(schema: Schema) -> list[str]:
    """The models that a field may hold."""
    inner = _inner(schema)
    return [s["$ref"] for s in inner.get("oneOf", [inner]) if "$ref" in s]


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ",".join(f" {sign} {schema[key]:.12g}" for key, sign in signs.items() if key in schema)


def _default(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"`{value['kind']}`" if "kind" in value else "`{}`" if not value else "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, list | tuple) else value}`"


def _prose(docstring: str) -> str:
    """As Markdown of a page in docs/reference."""
    text = re.sub(r"\(docs/(\w+\.md)\)", r"([\1](../\1))", inspect.cleandoc(docstring))
    return re.sub(r"<(?=\w)", "&lt;", re.sub(r"(?<!\n)\n(?!\n)", " ", text))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ------------------------------------------------------------------------------------------------------------ commands


def commands_page() -> str:
    top = parser()
    lines = ["# Command reference", "", "What `distmtl COMMAND --help` says; `--debug` shows the traceback of an error.", ""]
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        example = (command.epilog or "").removeprefix("example:\n").strip()
        lines += [f"## distmtl {name}", "", command.description or "", "", f"    {example}", ""]
        arguments = [
            f"| {_cell(_argument(a))} | {_cell(_meaning(command, a))} |" for a in command._actions if a.dest not in ("help", "debug")
        ]
        lines += ["| argument | means |", "|---|---|", *arguments, ""] if arguments else []
    return "\n".join(lines).rstrip() + "\n"


def _argument(action: argparse.Action) -> str:
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.nargs in ("?", "*"):
        value = f"[{value}]" + ("…" if action.nargs == "*" else "")
    elif action.nargs == "+":
        value += "…"
    names = ", ".join(action.option_strings)
    return f"`{names or value}`" if action.nargs == 0 or not names else f"`{names} {value}`"


def _meaning(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = command._get_formatter()._expand_help(action) if action.help else ""
    return f"{text} (must be given)".strip() if action.required and action.option_strings else text


if __name__ == "__main__":
    main()
