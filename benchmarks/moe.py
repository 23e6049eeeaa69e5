"""How much of MMoE's time is its matrix products: their time alone over that of forward and backward, input gradient included.

    .venv/bin/python -m benchmarks.moe [--rounds 9]

8 experts 512 → 512 → 256, 3 gates, 4096 rows, one thread; interleaved rounds, CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.gemms import DTYPES, Gemms, cpu_seconds, watched
from benchmarks.limit import keep_memory
from distmtl.model.layout import Features
from distmtl.model.mmoe import MMoE

ROWS, WIDTH, EXPERTS, EXPERT, TASKS = 4096, 512, 8, (512, 256), 3


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9)
    a = p.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    for name, dtype in DTYPES.items():
        model = MMoE(WIDTH, TASKS, EXPERTS, EXPERT)
        x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
        gradients = [torch.randn(ROWS, EXPERT[-1], dtype=dtype) for _ in range(TASKS)]

        def step(model=model, x=x, gradients=gradients, bf16=dtype == torch.bfloat16) -> None:  # type: ignore[no-untyped-def]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = model(Features((x,)))
            torch.autograd.backward(outputs, gradients)

        gemms = Gemms(watched(step), dtype)
        ratios = [cpu_seconds(gemms) / cpu_seconds(step) for _ in range(a.rounds)]
        print(f"{name}: matrix products / MMoE  {statistics.median(ratios):.3f}  ({min(ratios):.3f} … {max(ratios):.3f})")


if __name__ == "__main__":
    main()
