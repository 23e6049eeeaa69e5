"""The benchmarks' own arithmetic, and that their pieces run."""

import pytest
import tiny

from benchmarks.check import drops
from benchmarks.limit import DTYPES, cpu_seconds, exchange_bytes, pieces, products, real_batches
from benchmarks.loops import InMemory, PyTorch
from distmtl.config_file import parse_config
from distmtl.model.layout import Layout

MMOE = {"kind": "mmoe", "num_experts": 3, "expert": [16, 8]}


@pytest.fixture
def config(tmp_path):
    tiny.write(tmp_path)
    raw = tiny.raw(tmp_path, tmp_path / "run", model=MMOE)
    raw["tasks"] = raw["tasks"][:2]
    return parse_config(raw)


def test_a_drop_is_one_of_more_than_15_percent():
    assert drops({"a": 1.0, "b": 0.5}, {"a": 0.86, "b": 0.6}) == []
    assert drops({"a": 1.0, "b": 0.5}, {"a": 0.84}) == ["a: 1.000 before, 0.840 now", "b: no longer measured"]


def test_products_are_the_heads(config):
    width = Layout.of(config).width
    assert sorted(products(config)) == sorted(
        [(width, 16)] * 3 + [(16, 8)] * 3 + [(width, 6)] + [s for t in config.tasks for s in _tower(8, t.tower)]
    )


def _tower(width, layers):
    return list(zip((width, *layers), (*layers, 1), strict=True))


def test_every_piece_of_the_limit_and_the_loops_run(config):
    batches = real_batches(config, 2)
    work = pieces(config, batches)
    assert {f"gemm {p}" for p in DTYPES} <= work.keys()
    assert all(cpu_seconds(f) >= 0 and rows > 0 for f, rows in work.values())
    rows, ids = len(batches[0].rows), batches[0].sparse.values().numel()
    sizes = exchange_bytes(config, batches[0], 10)
    assert sizes["all-reduce"] == 40
    assert sizes["all-to-all"] == (ids * 8 + rows * len(config.embedded) * 4) // 2 + rows * sum(f.dim for f in config.embedded) * 4
    for loop in (InMemory(config, batches), PyTorch(config)):
        loop.train(batches)
