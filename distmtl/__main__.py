"""The command line: `distmtl COMMAND --help` shows each command with an example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distmtl.commands import (
    config,
    doctor,
    evaluate,
    export,
    health,
    init,
    leaderboard,
    plan,
    predict,
    prepare,
    report,
    serve,
    synth,
    train,
    tune,
    verify,
    watch,
)  # fmt: skip
from distmtl.errors import DistmtlError

COMMANDS = {
    "synth": synth,
    "prepare": prepare,
    "init": init,
    "train": train,
    "evaluate": evaluate,
    "health": health,
    "watch": watch,
    "report": report,
    "leaderboard": leaderboard,
    "tune": tune,
    "export": export,
    "predict": predict,
    "serve": serve,
    "verify": verify,
    "plan": plan,
    "config": config,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return arguments.run(arguments) or 0
    except (DistmtlError, OSError) as e:  # an OSError is a disk or a permission: its text says which
        if getattr(arguments, "debug", False):
            raise
        print(f"distmtl {arguments.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"distmtl {arguments.command}: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value may stand anywhere: argparse itself loses those behind an option."""
    arguments, rest = parser().parse_known_args(argv)
    strange = [r for r in rest if r.startswith("-") or "=" not in r or not hasattr(arguments, "overrides")]
    if strange:
        parser().error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        arguments.overrides += rest
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="distmtl", description="Train multi-task recommendation models on sharded embedding tables.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        p = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        p.set_defaults(run=command.run)
        command.add(p)
    return top


if __name__ == "__main__":
    sys.exit(main())
