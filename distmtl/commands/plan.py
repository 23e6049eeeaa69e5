"""`distmtl plan`."""

from __future__ import annotations

import argparse
import json

from distmtl.commands.arguments import config_arguments

HELP = "Say where every table would lie on a cluster, whether it fits, and what a step would cost. Allocates nothing."
EXAMPLE = "distmtl plan configs/planning/ranking_1e12.yaml --world-size 64,128 --device cuda --hbm-gb 80"


def add(p: argparse.ArgumentParser) -> None:
    config_arguments(p)
    p.add_argument(
        "--world-size", required=True, type=world_sizes, metavar="N[,M,…]",
        help="workers; of several the smallest that fits is shown in full, and the exit code is 1 if none does",
    )  # fmt: skip
    p.add_argument("--ranks-per-node", type=int, metavar="N", help="workers of a node (default: 8)")
    p.add_argument("--device", choices=["cuda", "cpu"], help="where tables live (default: the config's cluster.device, for auto cuda)")
    p.add_argument("--hbm-gb", type=float, metavar="GIB", help="memory of a CUDA device (default: 80)")
    p.add_argument("--ddr-gb", type=float, metavar="GIB", help="host memory per rank (default: 128)")
    p.add_argument("--intra-gb-s", type=float, metavar="GB/S", help="bandwidth within a node (default: 600, TorchRec's; of gloo on CPU 1)")
    p.add_argument("--inter-gb-s", type=float, metavar="GB/S", help="bandwidth between nodes (default: 12.5, TorchRec's; of gloo on CPU 1)")
    p.add_argument("--hbm-gb-s", type=float, metavar="GB/S", help="bandwidth of HBM (default, TorchRec's: 897)")
    p.add_argument("--ddr-gb-s", type=float, metavar="GB/S", help="bandwidth of host memory (default, TorchRec's: 51)")
    p.add_argument("--json", action="store_true", help="print JSON instead")
    p.add_argument("--measure", action="store_true", help="also train 20 steps with one worker here (CPU) and compare")


def run(a: argparse.Namespace) -> int:
    from dataclasses import fields

    from distmtl.config_file import load_config
    from distmtl.planning.hardware import Hardware
    from distmtl.planning.report import make_report

    config = load_config(a.config, a.overrides)
    given = {f.name: getattr(a, f.name) for f in fields(Hardware) if getattr(a, f.name) is not None}
    device = given.pop("device", "cpu" if config.cluster.device == "cpu" else "cuda")
    report = make_report(config, Hardware.of(device, **given), a.world_size, a.measure)
    print(json.dumps(report.json()) if a.json else report.text())
    return 0 if report.fits else 1


def world_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or numbers with commas between") from None
