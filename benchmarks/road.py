"""Where a step's time goes on one CPU thread, as ratios to what bounds it, measured side by side.

    .venv/bin/python benchmarks/road.py data/synthetic/mmoe.yaml [section.key=value …]

decode: pyarrow reads the same columns and nothing else.   reader: Parquet to Batch, in training order, checked.
gemm: the head's matrix products alone, forward and backward.   step: everything, from a Batch to updated tables.
Interleaved rounds, CPU seconds of the process, medians. The machine's own noise shows in the spread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from distmtl.config_file import load_config
from distmtl.distributed.process import process_group
from distmtl.loop import Training, open_splits
from distmtl.model.experts import Experts
from distmtl.progress import Progress

ROUNDS, STEPS = 7, 10


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        config = load_config(sys.argv[1], [*sys.argv[2:], f"run.dir={folder}"])
        with process_group(config) as process:
            training = Training(config, process, open_splits(config), Progress(None, False, print))
            training.model.train()
            rows = STEPS * config.train.global_batch_size
            source = forever(training)
            for _ in range(STEPS):  # warm up
                training.pipeline.progress(source)
            batches = [next(source) for _ in range(STEPS)]
            products = head_products(training, config.train.global_batch_size)
            measured: dict[str, list[float]] = {}
            for _ in range(ROUNDS):
                for name, work in {
                    "decode": lambda: decode(training, rows),
                    "reader": lambda: [next(source) for _ in range(STEPS)],
                    "gemm": lambda: [gemm(products) for _ in range(STEPS)],
                    "step": lambda: train_on(training, batches),
                }.items():
                    measured.setdefault(name, []).append(rows / cpu_seconds(work))
    speed = {name: statistics.median(rates) for name, rates in measured.items()}
    where = f"1 thread, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{Path(sys.argv[1])}: {config.model.kind}, batch {config.train.global_batch_size}, {where}")
    print(f"{'':8}{'rows per CPU second':>22}{'min':>12}{'max':>12}")
    for name, rates in measured.items():
        print(f"{name:8}{speed[name]:>22,.0f}{min(rates):>12,.0f}{max(rates):>12,.0f}")
    print(f"reader / decode {speed['reader'] / speed['decode']:.2f}    step / gemm {speed['step'] / speed['gemm']:.2f}")


def forever(training: Training) -> Iterator:
    first = 0
    while True:
        yield from training.reader.batches(first, first + training.reader.steps_per_epoch)
        first += training.reader.steps_per_epoch


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def decode(training: Training, rows: int) -> None:
    dataset, left = training.reader.dataset, rows
    for part in range(len(dataset.parts)):
        with dataset.open_part(part) as file:
            for batch in file.iter_batches(batch_size=8192, columns=training.reader.collate.columns, use_threads=False):
                left -= batch.num_rows
                if left <= 0:
                    return
    raise SystemExit(f"the training set has fewer than {rows} rows; lower train.global_batch_size")


def head_products(training: Training, batch: int) -> list[tuple[Tensor, Tensor]]:
    """(input, weight) of every linear layer in the head, at the training batch size."""
    layers = []
    for module in training.train_model.model.head.modules():
        if isinstance(module, Experts):
            layers += [w[e].detach().clone() for w in module.weights for e in range(w.shape[0])]
        elif isinstance(module, torch.nn.Linear):
            layers.append(module.weight.detach().clone())
    return [(torch.randn(batch, w.shape[1]), w) for w in layers]


def gemm(products: list[tuple[Tensor, Tensor]]) -> None:
    for x, w in products:
        y = x @ w.T  # forward
        y @ w  # gradient of the input
        y.T @ x  # gradient of the weight


def train_on(training: Training, batches: list) -> None:
    pipeline = type(training.pipeline)(training.model, training.optimizers, training.process.device)
    source = iter(batches)
    for _ in batches:
        pipeline.progress(source)


if __name__ == "__main__":
    main()
