"""`distmtl config`."""

from __future__ import annotations

import argparse

from distmtl.commands.arguments import config_arguments

HELP = "Print the resolved config."
EXAMPLE = "distmtl config configs/synthetic.yaml model.num_experts=8"


def add(p: argparse.ArgumentParser) -> None:
    config_arguments(p)


def run(a: argparse.Namespace) -> None:
    from distmtl.config_file import dump_config, load_config

    config = load_config(a.config, a.overrides)
    run = config.run.model_copy(update={"dir": config.run_dir})  # by default it follows from the name
    print(dump_config(config.model_copy(update={"run": run})), end="")
