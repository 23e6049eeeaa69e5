"""On one CUDA device what holds on CPU: TorchRec's overlapping pipeline, NCCL, FBGEMM's kernels, against plain PyTorch on CPU."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import every_task
import options
import partitioned
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from heads import HEADS, config_for
from states import state_of
from torchrec.distributed import TrainPipelineSparseDist
from worlds import saved_state

import distmtl
from distmtl import checkpoint
from distmtl.config import Config, WeightingConfig
from distmtl.config_file import parse_config
from distmtl.data.splits import open_splits
from distmtl.distributed import planner, process
from distmtl.distributed.process import Process, process_group
from distmtl.errors import DistmtlError
from distmtl.evaluation import evaluate, evaluate_split
from distmtl.following import Until, follow
from distmtl.loop import Training, train
from distmtl.model.kernels import linear_relu, mix, segment_sum, spread
from distmtl.pipeline import alone
from distmtl.progress import Progress
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import ShortRun, loaded_state, short_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SGD = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}}
WEIGHTINGS = [kind for c in get_args(get_args(WeightingConfig)[0]) for kind in get_args(c.model_fields["kind"].annotation)]
CACHED = {table: {"memory": "cached", "cache": 0.1} for table in ("user", "item", "city")}  # 32 rows: fewer than a step reads
SEQUENCES = [
    {"name": "history", "table": "item", "rows": 50, "pooling": "target", "target": "item", "attention": [6], "max_length": 3},
    {"name": "shelf", "rows": 20, "pooling": "attention", "max_length": 2, "too_long": "newest"},
    {"name": "shelf_again", "table": "shelf", "rows": 20, "pooling": "mean", "max_length": 3},
    {"name": "words", "rows": 20, "pooling": "sum", "max_length": 3, "dim": 4},
]  # fmt: skip


def on(device: str, config: Config) -> Config:
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": device})})


def run_of(folder: Path, run: Path, device: str, **sections: Any) -> Config:
    return tiny.config(folder, run, **{"cluster": {"device": device}, **sections})


def training_of(config: Config, process: Process) -> Training:
    return Training(config, process, open_splits(config), Progress(None, False, print))


def assert_equals_plain_pytorch_on_cpu(config: Config, weights: bool = True) -> ShortRun:
    """Losses, λ and, with `weights`, everything that is trained."""
    run = short_run(on("cuda", config), steps=5)
    run = replace(
        run,
        losses=run.losses.cpu(),
        weighting=run.weighting.cpu(),
        before={n: v.cpu() for n, v in run.before.items()},
        after={n: v.cpu() for n, v in run.after.items()},
    )
    losses, weighting, expected = unsharded_run(config, [run])
    torch.testing.assert_close(run.losses, losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(run.weighting, weighting, rtol=1e-4, atol=0)
    for name in expected if weights else ():
        torch.testing.assert_close(run.after[name], expected[name], rtol=1e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    return run


@pytest.mark.parametrize("kind", HEADS)
def test_every_head(tiny_data, tmp_path, kind):
    assert_equals_plain_pytorch_on_cpu(config_for(kind, tiny_data, tmp_path))


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_every_weighting(tiny_data, tmp_path, kind):
    options = {"window": 1} if kind == "dwa" else {}
    assert_equals_plain_pytorch_on_cpu(tiny.config(tiny_data, tmp_path, weighting={"kind": kind, **options}, optimizer=SGD))


@pytest.mark.parametrize("interaction", [options.CROSS, {"kind": "dot"}], ids=["cross", "dot"])
def test_every_option_of_features(tiny_data, tmp_path, interaction):
    assert_equals_plain_pytorch_on_cpu(options.with_options(tiny_data, tmp_path, interaction))


@pytest.mark.parametrize("out_of_range", ["hash", "quotient"])
def test_ids_that_read_two_rows(tiny_data, tmp_path, out_of_range):
    raw = tiny.raw(tiny_data, tmp_path, optimizer=SGD)
    for feature, rows in zip(raw["features"][:4], (31, 20, 7, 10), strict=True):
        feature |= {"out_of_range": out_of_range, "hashes": 2, "rows": rows}
    assert_equals_plain_pytorch_on_cpu(parse_config(raw))


def test_every_kind_of_task(tmp_path, monkeypatch):
    """Losses, and the metrics of one checkpoint on both devices, calibrated and of slices."""
    for split, rows in (("train", 1501), ("validation", 700)):
        (tmp_path / split).mkdir()
        pq.write_table(every_task.table(rows, len(split)), tmp_path / split / "a.parquet", row_group_size=310)
    tasks = [{"tower": [8], **task} for task, _ in every_task.TASKS]
    tasks[0]["calibration"] = {"kind": "isotonic"}
    raw = tiny.raw(tmp_path, tmp_path / "run", model={"kind": "esmm"}, tasks=tasks, optimizer=SGD, cluster={"device": "cuda"})
    assert_equals_plain_pytorch_on_cpu(parse_config(raw))
    train(parse_config(raw), report=lambda record: None)
    on_cuda = evaluate(str(tmp_path / "run"), split="validation", slices=["user", "item:55,65", "city="])["validation"]
    monkeypatch.setattr(process, "choose_device", lambda config: torch.device("cpu"))
    on_cpu = evaluate(str(tmp_path / "run"), split="validation", slices=["user", "item:55,65", "city="])["validation"]
    assert flat(on_cuda) == pytest.approx(flat(on_cpu), rel=1e-3, abs=1e-6) and len(flat(on_cuda)) > 500


def flat(metrics: Any, name: str = "") -> dict[str, float]:
    if not isinstance(metrics, dict):
        return {} if metrics is None else {name: metrics}
    return {n: v for key, value in metrics.items() for n, v in flat(value, f"{name}/{key}").items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_every_sharding_type(tiny_data, tmp_path, sharding, optimizer):
    """Of bags and sequences, tables that several features read, and two widths."""
    if (sharding, optimizer) == ("column_wise", "rowwise_adagrad"):
        pytest.skip("its momentum is of whole rows")
    raw = tiny.raw(tiny_data, tmp_path, optimizer={"tables": {"kind": optimizer, "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}})
    raw["features"][0]["dim"] = raw["features"][1]["dim"] = 64
    raw["features"] += [{"kind": "sequence", "column": "tags", "dim": 64, **s} for s in SEQUENCES]
    raw["tables"] = {t: {"sharding": [sharding]} for t in ("user", "item", "shelf")}
    run = assert_equals_plain_pytorch_on_cpu(parse_config(raw), weights=optimizer == "sgd")
    assert {run.sharding[t] for t in raw["tables"]} == {sharding}


@pytest.mark.parametrize(
    ("sharding", "memory", "optimizer"),
    [
        *(("table_wise", memory, o) for memory in ("host", "cached", "mixed") for o in ("sgd", "adagrad", "rowwise_adagrad")),
        *((sharding, memory, "sgd") for sharding in ("row_wise", "column_wise") for memory in ("host", "cached")),
    ],
)
def test_tables_in_host_memory(tiny_data, tmp_path, sharding, memory, optimizer):
    """FUSED_UVM and FUSED_UVM_CACHING of bags and sequences, beside tables of the device; the cache is smaller than a step's ids."""
    raw = tiny.raw(tiny_data, tmp_path, optimizer={"tables": {"kind": optimizer, "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}})
    raw["features"][0]["dim"] = raw["features"][1]["dim"] = 64
    raw["features"] += [{"kind": "sequence", "column": "tags", "dim": 64, **s} for s in SEQUENCES]
    memories = ["host", "cached", "device"] if memory == "mixed" else [memory] * 3
    raw["tables"] = {
        t: {"sharding": [sharding], "memory": m, **({"cache": 0.1} if m == "cached" else {})}
        for t, m in zip(("user", "item", "shelf"), memories, strict=True)
    }
    assert_equals_plain_pytorch_on_cpu(parse_config(raw), weights=optimizer == "sgd")


def test_tables_in_host_memory_leave_the_device_free(tiny_data, tmp_path):
    """Of weights and optimizer state; of a cached table the device holds its share of the weights."""
    held = {}
    for memory in ("device", "host", "cached"):
        raw = tiny.raw(tiny_data, tmp_path, cluster={"device": "cuda"}, optimizer={"tables": {"kind": "adagrad"}})
        raw["features"][0] |= {"rows": 16_384, "dim": 64}  # 4 MiB, and as much state
        raw["tables"] = {"user": {"memory": memory, **({"cache": 0.25} if memory == "cached" else {})}}
        config, before = parse_config(raw), torch.cuda.memory_allocated()
        with process_group(config) as here:
            training = training_of(config, here)
            held[memory] = (torch.cuda.memory_allocated() - before) / 2**20
            del training
        gc.collect()
    assert 7.9 < held["device"] - held["host"] < 8.1 and 0.9 < held["cached"] - held["host"] < 1.6, held


def test_tables_larger_than_the_device(tiny_data, tmp_path, monkeypatch):
    """As the planner sees it: it is told of a device of 8 MiB."""
    raw = tiny.raw(tiny_data, tmp_path, cluster={"device": "cuda"}, optimizer=SGD)
    raw["features"][0] |= {"rows": 40_000, "dim": 64}  # 10 MiB
    whole = planner.Topology
    with monkeypatch.context() as m:
        m.setattr(planner, "Topology", lambda *at, **has: whole(*at, **{**has, "hbm_cap": 8 * 2**20}))
        with pytest.raises(DistmtlError, match="no sharding plan .*tables.NAME.memory: cached"):
            short_run(parse_config(raw), steps=1)
        raw["tables"] = {"user": {"memory": "cached", "cache": 0.01}}
        assert short_run(parse_config(raw), steps=5).losses.isfinite().all()
    assert_equals_plain_pytorch_on_cpu(parse_config(raw))


def test_adam_of_tables_in_host_memory(tiny_data, tmp_path):
    """No other arithmetic than in the device's memory."""
    optimizer = {"tables": {"kind": "adam", "lr": 0.01}, "dense": {"kind": "adam", "lr": 0.01}}
    runs = [short_run(run_of(tiny_data, tmp_path, "cuda", optimizer=optimizer, tables=tables), steps=8) for tables in ({}, CACHED)]
    assert all(torch.equal(v, runs[1].after[n]) for n, v in runs[0].after.items())


def test_what_a_checkpoint_holds_of_cached_tables(tiny_data, tmp_path):
    """What it holds of tables of the device, to the last bit; what is loaded over them is what the model computes with."""
    states, sections = [], {"train": {"steps": 20, "save_every": 10, "eval_every": 10, "keep": 9}}
    for name, tables in (("device", {}), ("cached", CACHED)):
        config = run_of(tiny_data, tmp_path / name, "cuda", tables=tables, **sections)
        train(config, report=lambda record: None)
        states.append(saved_state(config, 20))
        assert [t["memory"] for t in json.loads((tmp_path / name / "plan.json").read_text())["tables"]].count(name) >= 3
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][n]) for n, v in states[0].items())

    measured = {}
    for device in ("cuda", "cpu"):
        with process_group(on(device, config)) as here:
            training = training_of(on(device, config), here)
            if device == "cuda":
                train_steps(training, 6)
                tables = [m for module in training.model.modules() for lookup in getattr(module, "_lookups", ()) for m in lookup.modules()]
                assert any(getattr(m, "lxu_cache_weights", torch.zeros(0)).numel() for m in tables), "nothing is cached"
            checkpoint.load(checkpoint.of_step(tmp_path / "cached" / "checkpoints", 10), training.model, training.optimizers)
            with alone(training.pipeline):
                measured[device] = evaluate_split(training.train_model.model, training.splits["validation"], config, here)
            state, saved = state_of(training), saved_state(config, 10)
            assert all(torch.equal(v.cpu(), saved[n].cpu()) for n, v in state.items())
    assert measured["cuda"][0] == pytest.approx(measured["cpu"][0], rel=1e-5)
    for task, metrics in measured["cpu"][1].items():
        assert measured["cuda"][1][task] == pytest.approx(metrics, rel=1e-4), task


def train_steps(training: Training, steps: int) -> None:
    training.model.train()
    source = iter(list(training.reader.batches(0, steps)))
    for step in range(steps):
        training.optimizers.set_step(step)
        training.pipeline.progress(source)


@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad", "sgd"])
def test_every_dense_optimizer(tiny_data, tmp_path, kind):
    """Losses; of the weights the first steps of adam and adagrad amplify rounding."""
    optimizer = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": kind, "lr": 0.01}}
    losses = {}
    for device in ("cpu", "cuda"):
        losses[device] = short_run(run_of(tiny_data, tmp_path, device, optimizer=optimizer), steps=8).losses.cpu()
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=0, atol=2e-5)


def test_a_head_of_ones_own(tiny_data, tmp_path):
    model = {"kind": "plugin", "target": "test_heads:TwoLinear", "args": {"hidden": 6}}
    assert_equals_plain_pytorch_on_cpu(tiny.config(tiny_data, tmp_path, model=model, optimizer=SGD))


def test_a_followed_run(tmp_path):
    """Partition after partition, each measured before it is trained."""
    source, measured = tmp_path / "log", {}
    for i in range(3):
        partitioned.write(source, i)
    for device in ("cpu", "cuda"):
        raw = partitioned.raw(source, tmp_path / device, cluster={"device": device}, tables=CACHED)
        raw["model"]["dropout"] = 0.0
        follow(parse_config(raw), str(source), train, Until(partitions=3), report=lambda record: None)
        measured[device] = [line["metrics"] for line in partitioned.index_of(parse_config(raw))]
    assert len(measured["cuda"]) == 3
    for cuda, cpu in zip(measured["cuda"][1:], measured["cpu"][1:], strict=True):
        for task, metrics in cpu.items():
            assert cuda[task] == pytest.approx(metrics, rel=2e-3), task


@pytest.mark.parametrize("tables", [{}, CACHED], ids=["device", "cached"])
def test_the_host_waits_for_nothing_of_ours_in_a_step(tiny_data, tmp_path, tables):
    """What waits is TorchRec's distribution of the next ids, on a stream of its own."""
    config = run_of(tiny_data, tmp_path, "cuda", tables=tables)
    with process_group(config) as here, warnings.catch_warnings(record=True) as seen:
        training = training_of(config, here)
        assert isinstance(training.pipeline, TrainPipelineSparseDist)
        source = iter(list(training.reader.batches(0, 4)))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in range(4):
                training.optimizers.set_step(step)
                numbers = training.pipeline.progress(source)
                training.meter.add(numbers)
                training.health.add(numbers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
    assert waits and [w for w in waits if w.startswith(str(Path(distmtl.__file__).parent))] == []


@pytest.mark.parametrize(("dense", "memory"), [("adam", {}), ("adam", CACHED), ("adamw", {}), ("adagrad", {}), ("sgd", {})])
def test_a_skipped_step_changes_nothing(tiny_data, tmp_path, dense, memory):
    """Although the host does not know in time, under the optimizers whose kernels look for themselves."""
    optimizer = {"tables": {"kind": "rowwise_adagrad", "lr": 0.1}, "dense": {"kind": dense}}
    config = run_of(tiny_data, tmp_path, "cuda", optimizer=optimizer, tables=memory)
    with process_group(config) as here:
        training = training_of(config, here)
        batches = list(training.reader.batches(0, 4))
        batches[0].labels[3] = batches[2].labels[3] = torch.nan
        source, states, trained = iter(batches), [state_of(training)], []
        for _ in range(4):
            numbers = training.pipeline.progress(source)
            trained.append(bool(numbers.trained))
            states.append(state_of(training))
    assert trained == [False, True, False, True]
    for before, after, moved in zip(states, states[1:], trained, strict=False):
        names = [n for n in before if "/exp_avg" not in n and not n.endswith("/step")]
        assert [n for n in names if not torch.equal(before[n], after[n])] if moved else all(torch.equal(before[n], after[n]) for n in names)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_loss_that_is_not_finite_is_told_by_its_step(tmp_path, policy):
    tiny.write(tmp_path)
    file = tmp_path / "train" / "part-1.parquet"
    table = pq.read_table(file)
    rating = [1e30 if i == 700 else v for i, v in enumerate(table["rating"].to_pylist())]
    pq.write_table(table.set_column(table.column_names.index("rating"), "rating", pa.array(rating)), file, row_group_size=310)
    said: dict[str, list[str]] = {}
    saved: dict[str, str] = {}
    for device in ("cpu", "cuda"):
        options = {"log_every": 7, "save_every": 2, "eval_every": 24, "non_finite": {"policy": policy}}
        config, seen = run_of(tmp_path, tmp_path / device, device, train=options), []
        try:
            train(config, report=seen.append)
        except DistmtlError as e:
            seen.append({"kind": "note", "text": str(e)})
        said[device] = [r["text"].replace(str(tmp_path / device), "") for r in seen if r["kind"] == "note"]
        saved[device] = max(p.name for p in (tmp_path / device / "checkpoints").iterdir())
    assert said["cuda"] == said["cpu"] and any("the loss of rating is not finite" in text for text in said["cpu"])
    assert saved["cuda"] == saved["cpu"]


def trained_in_parts(
    folder: Path, run: Path, first: str, second: str, kind: str, dense: str = "adam", background: bool = True, **more: Any
) -> list[Config]:
    """Twenty steps on one device; the same from step 10 on another."""
    sections = {
        "optimizer": {"tables": {"kind": kind, "lr": 0.02}, "dense": {"kind": dense, "lr": 0.01}},
        "train": {"steps": 20, "eval_every": 10, "save_every": 10, "log_every": 1, "keep": 9, "save_in_background": background},
        **more,
    }
    whole, parts = run_of(folder, run / "whole", first, **sections), run_of(folder, run / "parts", second, **sections)
    train(whole, report=lambda record: None)
    shutil.copytree(whole.run_dir, parts.run_dir, ignore=shutil.ignore_patterns("step-000000020-0", "result.json", "metrics.jsonl"))
    return [whole, parts]


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize(("tables", "dense"), [({}, "adam"), (CACHED, "adagrad")], ids=["device", "cached"])
def test_a_checkpoint_goes_on_on_the_other_device(tiny_data, tmp_path, first, second, tables, dense):
    whole, parts = trained_in_parts(tiny_data, tmp_path, first, second, "rowwise_adagrad", dense, tables=tables)
    loaded = [{n: v.cpu() for n, v in loaded_state(on(device, parts)).items()} for device in (first, second)]
    assert loaded[0].keys() == loaded[1].keys() and all(torch.equal(v, loaded[1][n]) for n, v in loaded[0].items())
    train(parts, report=lambda record: None)
    a, b = ([r["loss"] for r in told(config, "train") if r["step"] > 10] for config in (whole, parts))
    assert len(a) == 10 and b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize("where", [{}, CACHED], ids=["device", "cached"])
@pytest.mark.parametrize(
    ("kind", "dense", "background"), [("rowwise_adagrad", "adam", True), ("adam", "adagrad", True), ("sgd", "sgd", False)]
)
def test_resumed_equals_uninterrupted(tiny_data, tmp_path, kind, dense, background, where):
    """To the last bit."""
    whole, parts = trained_in_parts(tiny_data, tmp_path, "cuda", "cuda", kind, dense, background, tables=where)
    train(parts, report=lambda record: None)
    a, b = (saved_state(config, 20) for config in (whole, parts))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def told(config: Config, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_adam_of_tables(tiny_data, tmp_path):
    """Kingma and Ba 2015: with its bias corrected, the first step moves by lr wherever there is a gradient."""
    optimizer = {"tables": {"kind": "adam", "lr": 0.01, "betas": [0.8, 0.99], "eps": 1e-12}, "dense": {"kind": "sgd", "lr": 0.1}}
    run = short_run(run_of(tiny_data, tmp_path, "cuda", optimizer=optimizer), steps=1)
    name = "model.embeddings.embedding_bags.item.weight"
    moved = (run.after[name] - run.before[name]).abs().cpu()
    touched = torch.zeros(len(moved), dtype=torch.bool)
    touched[run.batches[0].sparse["item"].values().long()] = True
    torch.testing.assert_close(moved, torch.where(touched[:, None], 0.01, 0.0).expand_as(moved), rtol=1e-3, atol=0)


def test_evaluation_on_cuda_is_that_on_cpu(tiny_data, tmp_path):
    """Of the same checkpoint, with a calibration fitted on either."""
    raw = tiny.raw(tiny_data, tmp_path / "cuda", train={"steps": 20}, cluster={"device": "cuda"})
    raw["tasks"][0]["calibration"] = {"kind": "platt"}
    config = parse_config(raw)
    on_cuda = train(config, report=lambda record: None)
    shutil.copytree(config.run_dir, tmp_path / "cpu", ignore=shutil.ignore_patterns("result.json", "calibration.json"))
    again = train(parse_config({**raw, "run": {"dir": str(tmp_path / "cpu")}, "cluster": {"device": "cpu"}}), report=lambda record: None)
    assert (on_cuda["device"], again["device"], again["steps"]) == ("cuda", "cpu", 20)
    for task, metrics in again["metrics"]["validation"].items():
        assert on_cuda["metrics"]["validation"][task] == pytest.approx(metrics, rel=1e-4), task


@pytest.mark.parametrize("sections", [{}, {"weighting": {"kind": "pcgrad"}}, {"optimizer": {"clip_norm": 0.5}}])
def test_a_run_on_cuda_learns_what_one_on_cpu_does(tiny_data, tmp_path, sections):
    losses = {}
    for device in ("cpu", "cuda"):
        config = run_of(tiny_data, tmp_path / device, device, train={"global_batch_size": 128, "steps": 20, "log_every": 1}, **sections)
        train(config, report=lambda record: None)
        losses[device] = [r["loss"] for r in told(config, "train")]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_bf16_learns_what_fp32_does(tiny_data, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        options = {"global_batch_size": 128, "steps": 20, "log_every": 1, "precision": precision}
        config = run_of(tiny_data, tmp_path / precision, "cuda", train=options)
        assert train(config, report=lambda record: None)["device"] == "cuda"
        losses[precision] = [r["loss"] for r in told(config, "train")]
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_a_profile_shows_the_device(tiny_data, tmp_path):
    train(run_of(tiny_data, tmp_path, "cuda", train={"steps": 6, "profile": {"first_step": 2, "steps": 2}}), report=lambda record: None)
    (trace,) = (tmp_path / "profile").glob("*.json*")
    assert '"cat": "kernel"' in trace.read_text()


def test_kernels():
    x, w, b = (torch.randn(*s, dtype=torch.float64, device="cuda", requires_grad=True) for s in ((9, 5), (3, 4, 5), (3, 4)))
    assert torch.autograd.gradcheck(lambda x, w, b: tuple(linear_relu([x] * 3, w, b)), (x, w, b))
    gates, experts = (torch.randn(*s, dtype=torch.float64, device="cuda", requires_grad=True) for s in ((2, 3, 9), (3, 9, 4)))
    assert torch.autograd.gradcheck(lambda g, e: tuple(mix(g, list(e))), (gates, experts))
    lengths = torch.tensor([4, 0, 5], device="cuda")
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, lengths), x)
    assert torch.autograd.gradcheck(lambda x: spread(x[:3], lengths, 9), x)
