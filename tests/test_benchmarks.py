"""The benchmarks' own arithmetic, and that their pieces run."""

import pytest
import tiny

from benchmarks import conflict, weighting
from benchmarks.check import drops
from benchmarks.gemms import DTYPES, cpu_seconds, products
from benchmarks.heads import HEADS, markdown, measure
from benchmarks.limit import exchange_bytes, pieces, real_batches
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
    """Of every layer forward, the gradient of its input and that of its weight."""
    width, rows = Layout.of(config).width, 5
    layers = [(width, 16)] * 3 + [(16, 8)] * 3 + [(width, 6)] + [(8, 8), (8, 1)] * 2  # experts, the gates as one, towers
    expected = [product for i, o in layers for product in ((i, rows, o), (o, rows, i), (rows, i, o))]
    unordered = lambda inner, *outer: (inner, *sorted(outer))  # noqa: E731  # (A·B)ᵀ = Bᵀ·Aᵀ
    found = [unordered(p.inner, p.rows, p.columns) for p in products(config, rows)]
    assert sorted(found) == sorted(unordered(*p) for p in expected)


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_measured_beside_its_own_products(config, kind):
    found = measure(config, [kind], rounds=1)[kind]
    assert found["ratio"] > 0 and found["products"] > 0.5 and found["parameters"] >= 1
    assert f"| {kind} | {found['products']:.2f} |" in markdown({"heads": {kind: found}})


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


def test_better_and_worse_are_beyond_the_interval():
    gain, loss, nothing = [0.2, 0.1, 0.3], [-0.2, -0.3, -0.1], [0.2, -0.1, 0.5]
    verdict = lambda *of: conflict.verdict(dict(zip(conflict.TASKS, of, strict=True)))  # noqa: E731
    assert verdict(gain, gain, gain) == "**better on every task**"
    assert verdict(gain, nothing, loss) == "better on click; worse on watch"
    assert verdict(nothing, nothing, nothing) == "the same"


def test_a_run_of_the_conflict_study(tmp_path):
    """Its test labels of watch are the truth, so that a share of 1 could be reached; the tasks' gradients are told."""
    conflict.write(tmp_path, "conflict", 0, 20_000)
    found = conflict.Run("conflict", "shared_bottom", "pcgrad", 0.003).make(tmp_path)
    assert found.keys() == {*conflict.TASKS, *conflict.PAIRS, "reached"}
    assert 0.5 < found["click"] < 1 and -0.5 < found["watch"] < 1
    assert all(-1 < found[pair] < 1 for pair in conflict.PAIRS)


def test_every_method_is_measured_beside_static_weights(config):
    found = weighting.measure(weighting.twice(config), rounds=1)
    assert found.keys() >= {"static, looking", *weighting.READING} and all(m["ratio"] > 0 for m in found.values())
    assert "| static, looking |" in weighting.markdown({"cases": {"4 tasks": found}})
