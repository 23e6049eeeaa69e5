"""Arguments that several commands have, and what they print alike."""

from __future__ import annotations

import argparse
import os
import re
import threading
from typing import Any


def config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="CONFIG", help="YAML file")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that differ from the file's")


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number


def interval(text: str) -> float:
    if not (number := seconds(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def slices(text: str) -> list[str]:
    """Features, each with edges or without: user_id,item_id:1,10 are two."""
    return re.split(r",(?=[^\d])", text) if text else []


def first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_metrics(metrics: dict[str, Any]) -> None:
    from distmtl.metrics import format_metrics

    print(format_metrics(metrics))
