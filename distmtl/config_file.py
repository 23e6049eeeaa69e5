"""YAML plus dotted overrides in, one frozen `Config` out; and back.

    config = load_config("configs/synthetic.yaml", ["train.epochs=2", "model.num_experts=8"])

Unknown keys are refused with a suggestion, alternatives carry a `kind`, and all mistakes of a file are reported at once.
Relative paths under `data` are relative to the YAML file; `run.dir` is relative to the working directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from distmtl.config import Config, Strict, did_you_mean
from distmtl.errors import DistmtlError

S = TypeVar("S", bound=Strict)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read `path` (YAML), apply `section.key=value` overrides, validate.

    Raises:
        DistmtlError: file missing or not YAML, or the list of every mistake in it.
    """
    return parse_file(read_mapping(path, overrides), Path(path))


def read_mapping(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping that a YAML file holds, with `section.key=value` overrides.

    Raises:
        DistmtlError: file missing, not YAML, or not a mapping; an override of what is not there.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DistmtlError(f"config {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DistmtlError(f"config {path} is not valid YAML: {_yaml_mistake(e)}") from None
    if not isinstance(raw, dict):
        found = "is empty; it" if raw is None else f"holds a {type(raw).__name__}, but"
        raise DistmtlError(f"config {path} {found} must hold a mapping (name: …, data: …)")
    for item in overrides:
        override(raw, item)
    return raw


def parse_file(raw: dict[str, Any], path: Path) -> Config:
    """Validate what a file holds; it gives the default name, and the folder that relative paths of data start from."""
    config = parse_config({"name": name_of(path), **raw}, str(path))
    data = config.data.model_copy(update={k: resolve(getattr(config.data, k), path.parent) for k in ("train", "validation", "test")})
    return config.model_copy(update={"data": data})


def name_of(path: Path) -> str:
    """A name from a file's."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.stem if path.stem[:1].isalpha() else f"_{path.stem}")


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Validate a mapping, as `load_config` does for a file.

    Raises:
        DistmtlError: the list of every mistake.
    """
    return parse_as(Config, raw, where)


def read_as(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file as a config of some kind, which has a `name`: the file's where it says none.

    Raises:
        DistmtlError: file missing or not YAML, or the list of every mistake in it.
    """
    return parse_as(kind, {"name": name_of(Path(path)), **read_mapping(path, overrides)}, str(path))


def parse_as(kind: type[S], raw: dict[str, Any], where: str) -> S:
    """Validate a mapping as a config of some kind.

    Raises:
        DistmtlError: the list of every mistake.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as e:
        errors = e.errors()
        inner = {err["loc"][:1] for err in errors if len(err["loc"]) > 1}  # a list with a bad element is not also too short
        lines = [line for err in errors if err["type"] != "too_short" or err["loc"] not in inner for line in _sentence(err, raw, kind)]
        raise DistmtlError(
            f"{where}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same object, every field spelled out."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → plain value; elements of a list go by their name where they have one."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        items = [(v.get("name", str(i)), v) for i, v in enumerate(tree)]
        items.append(("(order)", [name for name, _ in items]))  # dense weights go by position
    else:
        return {prefix: tree}
    if not items:
        return {prefix: tree}
    return {k: v for name, value in items for k, v in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()}


def dump_mapping(raw: dict[str, Any]) -> str:
    """A config as a person would write it, what it leaves out left out."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=140)


def parse_yaml(text: str) -> Any:
    """YAML as it is meant: a key given twice is an error, and 1e-3 is a number.

    Raises:
        yaml.YAMLError: not YAML.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as numbers."""


for _yaml in (_Loader, _Dumper):  # YAML 1.1, PyYAML's, wants a dot and a sign: 1.0e-3
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _yaml_mistake(e: Exception) -> str:
    mark = getattr(e, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {e.problem}" if mark else " ".join(str(e).split())  # type: ignore[attr-defined]


def override(raw: dict[str, Any], item: str) -> None:
    """Apply one `section.key=value`; an element of a list goes by its `name` or number.

    Raises:
        DistmtlError: not of that form, or no such place.
    """
    key, sep, value = item.partition("=")
    if not sep:
        raise DistmtlError(f"override {item!r} is not section.key=value")
    node, leaf = find(raw, key.strip(), f"override {item!r}")
    try:
        node[leaf] = parse_yaml(value)
    except yaml.YAMLError as e:
        raise DistmtlError(f"override {item!r}: the value is not valid YAML: {_yaml_mistake(e)}") from None


def find(raw: dict[str, Any], key: str, what: str) -> tuple[Any, Any]:
    """Where `section.key` is, or is to be: the mapping or list that holds it, and its key or index there.

    Args:
        what: what an error is said to be of.

    Raises:
        DistmtlError: no such place.
    """
    *parents, leaf = key.split(".")
    if not all((*parents, leaf)):
        raise DistmtlError(f"{what} is not section.key=value")
    node: Any = raw
    for i, part in enumerate(parents):
        node = _enter(node, part, ".".join(parents[:i]), what)
    return node, _index(node, leaf, ".".join(parents), what) if isinstance(node, list) else leaf


def _enter(node: Any, part: str, where: str, what: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, where, what)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise DistmtlError(f"{what}: {'.'.join(filter(None, (where, part)))} is a plain value and has no fields")
    return node[part]


def _index(node: list[Any], part: str, where: str, what: str) -> int:
    """An element of a list, by number or by its `name`."""
    names = [n.get("name") if isinstance(n, dict) else None for n in node]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise DistmtlError(f"{what}: {where} has no element {part!r}{did_you_mean(part, [n for n in names if n])}")


def merge(base: Any, change: Any) -> Any:
    """`change` laid over `base`, key by key, elements of lists by their `name`; another `kind` replaces the whole section."""
    if isinstance(base, dict) and isinstance(change, dict) and change.get("kind", base.get("kind")) == base.get("kind"):
        return base | {k: merge(base[k], v) if k in base else v for k, v in change.items()}
    if _named(base) and _named(change):
        changes = {c["name"]: c for c in change}
        merged = [merge(b, changes.pop(b["name"])) if b["name"] in changes else b for b in base]
        return merged + list(changes.values())
    return change


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in value)


def in_a_line(error: Exception) -> str:
    """An error as one line: a list of mistakes without its heading."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    listed = "; ".join(line.strip().removeprefix("- ") for line in rest)
    return listed if listed and "mistake" in first else f"{first}: {listed}" if listed else first


def resolve(path: str | None, base: Path) -> str | None:
    """A path of a file in folder `base`; a URI stays."""
    if path is None or "://" in path or Path(path).is_absolute():
        return path
    return str((base / Path(path).expanduser()).resolve())


def _sentence(err: Any, raw: Any, root: type[Strict]) -> list[str]:
    """One pydantic error as sentences with the key's place in the file."""
    place, around, members = _place(err["loc"], raw, root)
    where, kind, got = ".".join(place), err["type"], f"{err['input']!r:.80}"
    start = f"{where}: " if where else ""
    if kind == "extra_forbidden":
        elsewhere = [tag for tag, model in members.items() if place[-1] in model.model_fields]
        if elsewhere:
            return [f"{start}unknown key for this kind; it belongs to {' and '.join(elsewhere)}"]
        return [f"{start}unknown key{_elsewhere(place[-1], around, root)}"]
    if kind == "missing":
        return [f"{start}missing; it must be given"]
    if kind == "union_tag_invalid":
        return [f"{start}kind {err['ctx']['tag']!r} is not one of {', '.join(members)}{did_you_mean(err['ctx']['tag'], members)}"]
    if kind == "union_tag_not_found":
        return [f"{start}kind is missing; it is one of {', '.join(members)}"]
    if kind == "value_error":
        lines = str(err["ctx"]["error"]).split("\n")
        return [line if line.startswith(("feature", "table", "task")) else start + line for line in lines]
    if kind == "string_pattern_mismatch":
        rule = "package.module:Name" if place[-1] == "target" else "letters, digits, _ and -, and not start with a digit or -"
        return [f"{start}must be {rule}, got {got}"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{start}must be a mapping (key: value), got {got}"]
    if kind == "tuple_type":
        return [f"{start}must be a list, got {got}"]
    if kind == "too_short":
        return [f"{start}must not be empty"]
    truth = kind == "string_type" and isinstance(err["input"], bool)
    hint = "; YAML takes yes, no, on and off for truth values: quote it" if truth else ""
    return [f"{start}{err['msg'][:1].lower()}{err['msg'][1:]}, got {got}{hint}"]


def _place(loc: tuple[Any, ...], raw: Any, root: type[Strict]) -> tuple[list[str], list[str], dict[str, type[Strict]]]:
    """Of an error: its keys in the file (elements of a list by their name), the keys known beside it, and the kinds there are."""
    annotation: Any = root
    place: list[str] = []
    around: list[str] = []
    union: dict[str, type[Strict]] = {}
    kinds: dict[str, type[Strict]] = {}
    for part in loc:
        members = _members(annotation)
        if len(members) > 1:  # pydantic puts the kind in between
            annotation, union = members.get(part), members
            continue
        model = next(iter(members.values()), None)
        around, kinds, union = list(model.model_fields) if model else [], union, {}
        if model:
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
        else:  # of a list or a mapping
            annotation = next((a for a in reversed(get_args(annotation)) if a is not Ellipsis), None)
        raw = raw[part] if isinstance(raw, list) and isinstance(part, int) else raw.get(part) if isinstance(raw, dict) else None
        name = raw.get("name") if isinstance(part, int) and isinstance(raw, dict) else None
        place.append(name if isinstance(name, str) else str(part))
    return place, around, _members(annotation) or kinds


def _members(annotation: Any) -> dict[str, type[Strict]]:
    """The config classes that an annotation allows here, by their kind."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        kind = annotation.model_fields.get("kind")
        return {get_args(kind.annotation)[0] if kind else "": annotation}
    if annotation is None or get_origin(annotation) in (tuple, dict, Literal):
        return {}
    arguments = get_args(annotation)
    return {k: m for a in (arguments[:1] if get_origin(annotation) is Annotated else arguments) for k, m in _members(a).items()}


def _elsewhere(key: str, around: list[str], root: type[Strict]) -> str:
    """Where an unknown key probably belongs."""
    if near := did_you_mean(key, around):
        return near
    for section, field in root.model_fields.items():
        members = list(_members(field.annotation).values())
        if len(members) == 1 and key in members[0].model_fields and key != "kind":
            return f"; did you mean '{section}.{key}'?"
    return f"; known here: {', '.join(around)}"
