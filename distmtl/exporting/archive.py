"""What an exported program's archive may hold. torch.export.load unpickles, imports and evaluates whatever one asks for."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from distmtl.errors import DistmtlError

# Any other member may be a pickle, compiled code, or of an older format, in which everything is a pickle.
MEMBERS = re.compile(
    r"archive/(data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id)"
)
# Operators are attributes that torch looks up; sizes are sympy's, and it evaluates them.
OPERATOR = re.compile(
    r"torch\.ops\.[a-z]\w*\.((?!__)\w+|__(and|or|xor)__)(\.(?!__)\w+)?|torch\.sym_\w+|math\.[a-z]\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
SIZE = re.compile(
    r"([\d\s(),'=*/+-]|\b([su]\d+|Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|positive|nonnegative|integer|True)\b)+"
)
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")  # of arguments and results: others name what is to be imported


def refuse_code(file: Any, where: str) -> None:
    """Only a graph of operators (JSON) and plain bytes of tensors may be in the archive.

    Raises:
        DistmtlError: something else is, or it is no archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not MEMBERS.fullmatch(info.filename) or info.compress_type != zipfile.ZIP_STORED:
                    raise DistmtlError(f"{where}: {info.filename[:80]!r} is no part of a program; such things are never loaded")
                if info.filename.endswith("_config.json"):
                    payloads = json.loads(archive.read(info))["config"]
                    if any(p["use_pickle"] or not p["path_name"].startswith(("weight_", "tensor_")) for p in payloads.values()):
                        raise DistmtlError(f"{where}: {info.filename} names pickled objects, which are never loaded")
                elif info.filename.endswith(".pt") and info.file_size:
                    raise DistmtlError(f"{where}: {info.filename} is a pickle, which is never loaded")
                elif info.filename.endswith("/model.json"):
                    for text in _code(json.loads(archive.read(info))):
                        raise DistmtlError(f"{where}: {text[:80]!r} is neither an operator nor a size; other code is never loaded")
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        if isinstance(e, DistmtlError):
            raise
        raise DistmtlError(f"{where} is damaged: {type(e).__name__}: {e}; export again") from None


def _code(graph: Any) -> Iterator[str]:
    """What is more than operators, sizes and containers."""
    if isinstance(graph, dict):
        for key, value in graph.items():
            allowed = {"target": OPERATOR, "expr_str": SIZE}.get(key) if key != "target" or "inputs" in graph else None
            if allowed and not allowed.fullmatch(value):
                yield value
            elif key in ("in_spec", "out_spec") and value:
                yield from (kind for kind in _types(json.loads(value)) if kind not in CONTAINERS)
            else:
                yield from _code(value)
    elif isinstance(graph, list):
        for value in graph:
            yield from _code(value)


def _types(spec: Any) -> Iterator[Any]:
    if isinstance(spec, dict):
        yield spec["type"]
    for part in (spec.values() if isinstance(spec, dict) else spec) if isinstance(spec, dict | list) else ():
        yield from _types(part)
