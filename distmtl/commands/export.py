"""`distmtl export`."""

from __future__ import annotations

import argparse

HELP = "Turn a checkpoint into one directory that predict and serve need nothing else for."
EXAMPLE = "distmtl export runs/synthetic --out exports/synthetic --quantize int8"


def add(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--quantize", choices=["int8", "fp16"], help="keep rows of tables smaller, and print what that costs (default: fp32)")
    p.add_argument("--verify", action="store_true", help="score a sample of the config's data by the checkpoint too; differences fail")


def run(a: argparse.Namespace) -> None:
    from distmtl.distributed.process import quieten
    from distmtl.exporting.writer import export
    from distmtl.serving.comparison import compare, costs, refuse_apart

    quieten()
    manifest = export(a.path, a.out, a.quantize or "fp32")
    size = sum(size for size, _ in manifest.files.values())
    print(f"export {a.out}: step {manifest.step:,} of {manifest.checkpoint}, {size / 2**20:,.1f} MiB, digest {manifest.digest}")
    if a.quantize or a.verify:
        comparisons = compare(a.path, a.out)
        for c in comparisons:
            print(c.text())
        if not a.quantize:
            refuse_apart(comparisons)
    for line in costs(a.path, a.out) if a.quantize else ():
        print(line)
    print(f"next: distmtl serve {a.out}")
