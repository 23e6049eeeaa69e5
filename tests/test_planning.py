"""`distmtl plan`: the plan that training makes, storage by hand, no memory, what does not fit, one sentence for bad input."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from torchrec.distributed.types import CacheParams
from worlds import run_world

from distmtl.__main__ import main
from distmtl.config import Config
from distmtl.config_file import load_config, parse_config
from distmtl.distributed import planner
from distmtl.distributed.plan import describe, plan_text
from distmtl.distributed.planner import make_plan
from distmtl.distributed.process import process_group
from distmtl.distributed.sharding import attach_table_optimizers
from distmtl.model.multitask import TrainModel
from distmtl.planning.hardware import Hardware
from distmtl.planning.measured import measure
from distmtl.planning.report import make_report
from distmtl.planning.search import smallest_world
from distmtl.planning.world import dense_parameters, offline_model, plan_world

ROOT = Path(__file__).parents[1]
GIB = 2**30
CPU = Hardware.of("cpu")
BIG = [("user", 3_000_000, 16), ("item", 400_000, 16), ("cross", 900_000, 32), ("city", 500, 8), ("hour", 24, 4)]


def config(sizes=BIG, optimizer: str = "rowwise_adagrad", **sections: Any) -> Config:
    return parse_config(
        {
            "name": "planned",
            "data": {"train": "/nowhere"},
            "features": [{"kind": "id", "name": n, "rows": r, "dim": d} for n, r, d in sizes],
            "model": {"kind": "shared_bottom", "bottom": [8]},
            "tasks": [{"kind": "binary", "name": "click", "tower": [4]}],
            "optimizer": {"tables": {"kind": optimizer}, "dense": {"kind": "sgd"}},
            "train": {"global_batch_size": 1024},
            **sections,
        }
    )


def trained_plan(config: Config) -> list[Any]:
    """What a rank of a real world plans."""
    with process_group(config) as process:
        model = TrainModel(config, process.device)
        attach_table_optimizers(model, config, process.device)
        return list(describe(make_plan(model, config, process), config))


@pytest.mark.parametrize(
    ("optimizer", "types", "world_size", "local"),
    [
        ("rowwise_adagrad", ["table_wise", "row_wise"], 2, 2),
        ("sgd", ["table_wise", "row_wise", "column_wise"], 2, 2),
        ("adagrad", ["table_row_wise", "table_wise"], 4, 2),
    ],
)
def test_plan_is_the_one_that_training_makes(optimizer, types, world_size, local):
    cut = next(t for t in types if t != "table_wise")  # gloo is slow: left alone, tables that fit stay whole
    c = config(optimizer=optimizer, sharding={"types": types}, tables={"user": {"sharding": [cut]}})
    ranks = run_world(trained_plan, world_size, c, local_world_size=local)
    planned = plan_world(c, Hardware.of("cpu", ranks_per_node=local), world_size).planned
    assert planned == ranks[0] and all(r == ranks[0] for r in ranks)
    assert len({t.kind for t in planned}) > 1, "a plan of one kind proves little"


def test_shipped_config_is_planned_as_it_is_trained():
    c = load_config(ROOT / "configs" / "synthetic.yaml")
    assert plan_world(c, CPU, 2).planned == run_world(trained_plan, 2, c)[0]


@pytest.mark.parametrize(
    ("optimizer", "device", "per_row"),
    [("sgd", "cpu", 0), ("adagrad", "cpu", None), ("rowwise_adagrad", "cuda", 4), ("adam", "cuda", None)],
)
def test_storage_is_the_arithmetic_of_the_config(optimizer, device, per_row):
    W, rows, dim = 2, 1_000_001, 16
    c = config([("a", rows, dim), ("b", 1000, 8)], optimizer, tables={"a": {"sharding": ["row_wise"]}})
    world = plan_world(c, Hardware(device=device), W)
    memory, numbers = world.memory, rows * dim + 1000 * 8
    state = (rows + 1000) * per_row if per_row is not None else {"adagrad": 4, "adam": 8}[optimizer] * numbers
    assert sum(memory["weights"]) == 4 * numbers
    assert sum(memory["optimizer"]) == state
    assert sum(t.mb for t in world.planned) * 2**20 == pytest.approx(4 * numbers + state, abs=2)
    batch = 1024 // W
    a = W * (batch * 8 + batch * W * dim * 4)  # row_wise: every rank gets its share of all ids, returns partial sums of all rows
    b = batch * W * 8 + batch * W * 8 * 4  # table_wise: one rank gets all ids and returns all rows
    assert sum(memory["buffers"]) == a + b
    dense = dense_parameters(TrainModel(c, torch.device("cpu")))
    assert dense == (24 * 8 + 8) + (8 * 4 + 4) + (4 + 1)
    assert memory["dense"] == [dense * 4 * 2] * W  # sgd: weights and gradients
    for parts in zip(*memory.values(), strict=True):
        assert sum(parts) == pytest.approx(world.capacity)
    assert world.host == [0.0] * W


def test_every_feature_of_a_shared_table_is_counted():
    raw = config([("a", 1000, 8)]).model_dump(mode="json")
    shared = parse_config({**raw, "features": [*raw["features"], {**raw["features"][0], "name": "again", "table": "a"}]})
    one, two = plan_world(config([("a", 1000, 8)]), CPU, 2), plan_world(shared, CPU, 2)
    assert sum(two.memory["buffers"]) == 2 * sum(one.memory["buffers"]) and two.memory["weights"] == one.memory["weights"]
    assert two.step_ms > one.step_ms


@pytest.mark.parametrize(("kind", "numbers"), [("adam", 4), ("adamw", 4), ("adagrad", 3), ("sgd", 2)])
def test_dense_optimizer_state(kind, numbers):
    c = parse_config({**config().model_dump(mode="json"), "optimizer": {"dense": {"kind": kind}}})
    dense = dense_parameters(offline_model(c, "cpu"))
    assert plan_world(c, CPU, 1).memory["dense"] == [dense * 4 * numbers]


def test_a_trillion_parameters_on_128_ranks_take_neither_memory_nor_a_minute():
    c = load_config(ROOT / "configs" / "planning" / "ranking_1e12.yaml")
    assert sum(f.rows * f.dim for f in c.embedded) > 1e12
    plan_world(c, Hardware(), 64)  # imports and caches
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    world = plan_world(c, Hardware(), 128)
    assert world.fits and time.monotonic() - began < 60
    assert psutil.Process().memory_info().rss - before < 100 * 2**20  # the shards' descriptions; the tables are 3.7 TB
    assert max(world.memory["weights"]) < 80 * GIB and world.step_ms > 0
    lines = plan_text(world.planned, 128).splitlines()
    assert len(lines) == 34 and max(map(len, lines)) < 140 and "median" in lines[0]


@pytest.mark.parametrize("hbm_gb", [0.155, 0.3, 1.0])
def test_bisection_finds_what_the_full_search_finds(monkeypatch, hbm_gb):
    c = config([(f"t{i}", 2_000_000 // (i + 1), 32) for i in range(24)])
    fine = plan_world(c, Hardware(hbm_gb=hbm_gb), 8)
    proposals, proposer = [], planner.BisectingProposer
    monkeypatch.setattr(planner, "BisectingProposer", lambda n: proposals.append(n) or proposer(n))
    monkeypatch.setattr(planner, "SEARCH", 1000)
    coarse = plan_world(c, Hardware(hbm_gb=hbm_gb), 8)
    assert proposals == [14], "the search was small enough for TorchRec's own"
    assert fine.fits and coarse.step_ms <= 1.01 * fine.step_ms
    assert {t.table: t.kind for t in coarse.planned} == {t.table: t.kind for t in fine.planned}


def test_smallest_world_is_the_first_that_fits():
    c, hardware = config([(f"t{i}", 1_000_000, 64) for i in range(6)]), Hardware(hbm_gb=0.2)
    by_hand = next(w for w in (1, 2, 4, 8, 16, 24, 32) if plan_world(c, hardware, w).fits)
    assert by_hand > 8
    for tried in ([], [4], [64], [4, 64], [by_hand]):
        found = smallest_world(c, hardware, [plan_world(c, hardware, w) for w in tried])
        assert found.world_size == by_hand, tried


def test_a_table_that_may_not_be_split_fits_nowhere():
    c = config([("t", 10_000_000, 64)], sharding={"types": ["table_wise"]})
    found = smallest_world(c, Hardware(hbm_gb=1), [])
    assert isinstance(found, str) and "'t' may only lie whole on one rank (2.4 GiB); let it be row_wise" in found


@pytest.mark.parametrize("memory", ["host", "cached"])
def test_smallest_world_of_a_whole_table_in_host_memory(memory):
    """Whether it fits is the host's matter, not the device's; on CPU there is only one memory."""
    c = config([("t", 10_000_000, 64)], tables={"t": {"memory": memory, "sharding": ["table_wise"]}})
    found = smallest_world(c, Hardware(hbm_gb=1), [])
    assert not isinstance(found, str) and found.world_size == 1 and found.host[0] > 2.4 * GIB
    for small in (Hardware(ddr_gb=2), Hardware.of("cpu", ddr_gb=2)):
        assert "'t' may only lie whole on one rank (2.4 GiB)" in smallest_world(c, small, [])
    large = config([("t", 10_000_000, 64)], tables={"t": {"memory": "cached", "cache": 0.9, "sharding": ["table_wise"]}})
    assert "'t' may only lie whole on one rank (2.1 GiB)" in smallest_world(large, Hardware(hbm_gb=1), [])


def test_host_memory_that_lacks_is_named():
    c = config([("t", 10_000_000, 64), ("s", 1_000, 64)], tables={"t": {"memory": "host"}})
    misfit = plan_world(c, Hardware(ddr_gb=2), 1).misfit
    assert "table 't' (10,000,000 rows x 64) does not fit by itself: table_wise, one rank would hold 2.4 GiB, " in misfit[0]
    assert "2.0 GiB of host memory for tables (of 2.0 GiB)" in misfit[0]
    assert misfit[1].startswith("all tables together need 2.4 GiB of host memory, 1 rank(s) have 2.0 GiB") and len(misfit) == 2


def test_what_lies_in_host_memory_is_not_moved_there():
    """Of 12.1, 6.1 and 2.9 GiB on 3.8 GiB the largest is there, the next follows, and where a fifth of it is too much the last."""
    c = config([("t", 50_000_000, 64), ("u", 25_000_000, 64), ("v", 12_000_000, 64)], tables={"t": {"memory": "host"}})
    report = make_report(c, Hardware(hbm_gb=4.5), [1])
    assert not report.fits and [h.tables for h in report.host] == [["u", "v"], ["u"], ["u"]] and all(h.world.fits for h in report.host)
    alone = config([("t", 50_000_000, 64)], tables={"t": {"memory": "host"}})
    report = make_report(alone, Hardware(ddr_gb=2), [1])
    assert not report.fits and report.host == [] and "of host memory" in report.text()


def no_plan(change: dict[str, Any], hardware: Hardware, world_size: int = 1, **sections: Any) -> str:
    """What training says, of an error of TorchRec's own."""
    c, topology = config([("t", 10_000_000, 64), ("s", 1_000, 64)], **sections), hardware.topology(world_size)
    allowed = planner.constraints(c, world_size, world_size, "cuda")
    allowed = {t: replace(a, **change) if t == "t" else a for t, a in allowed.items()}
    with pytest.raises(planner.PlannerError) as e:
        planner.make_planner(c, topology, allowed).plan(offline_model(c, "cuda"), planner.sharders())
    return planner._no_plan(e.value, allowed, "cuda")


def test_why_there_is_no_plan():
    hint, small, whole = "keep the largest tables in host memory", Hardware(hbm_gb=1), {"sharding_types": ["table_wise"]}
    assert "insufficient storage; `distmtl plan`" in no_plan({}, small) and hint in no_plan({}, small)
    assert hint in no_plan(whole, Hardware(hbm_gb=2), 4)  # one rank's memory is too small, theirs together is not: "strict constraints"
    there = {"t": {"memory": "host"}, "s": {"memory": "host"}}
    assert hint not in no_plan({}, Hardware(ddr_gb=1), tables=there)
    wrong = no_plan({"compute_kernels": ["fused_uvm_caching"], "cache_params": CacheParams(load_factor=1.5)}, Hardware())
    assert "1 violation(s): " in wrong and ".t: fused_uvm_caching requires cache_load_factor strictly between 0 and 1, got 1.5" in wrong
    assert hint not in wrong and "\n" not in wrong
    # Whatever the constraints forbid besides: no config is known that leads there.
    other = planner.PlannerError(
        "Unable to find a plan because of the strict constraints. \nGrid …", planner.PlannerErrorType.STRICT_CONSTRAINTS
    )
    said = planner._no_plan(other, planner.constraints(config(), 1, 1, "cuda"), "cuda")
    assert hint not in said and said.startswith("Unable to find a plan because of the strict constraints; `distmtl plan` tells")


@pytest.fixture
def planned_file(tmp_path):
    def write(c: Config) -> str:
        from distmtl.config_file import dump_config

        path = tmp_path / "planned.yaml"
        path.write_text(dump_config(c))
        return str(path)

    return write


def test_what_does_not_fit_is_named_and_fails(planned_file, capsys):
    path = planned_file(config([("huge", 100_000_000, 64), ("small", 1_000, 64)]))
    assert main(["plan", path, "--world-size", "2", "--hbm-gb", "4", "--device", "cuda"]) == 1
    out = capsys.readouterr().out
    assert "does not fit on 2 rank(s)" in out
    assert "table 'huge' (100,000,000 rows x 64) does not fit by itself: row_wise, one rank would hold 12.1 GiB" in out
    assert "all tables together need" in out and "fused_uvm_caching" in out
    assert "smallest world size that fits: 8" in out
    assert main(["plan", path, "--world-size", "2", "--hbm-gb", "40"]) == 0
    assert main(["plan", path, "--world-size", "2", "--device", "cpu", "--ddr-gb", "1"]) == 1
    assert "host memory" not in capsys.readouterr().out.split("does not fit on 2")[1]  # CPU has no other memory to move to


def test_host_memory_is_what_remains(planned_file, capsys):
    path = planned_file(config([("huge", 100_000_000, 64), ("small", 1_000, 64)]))
    assert main(["plan", path, "--world-size", "2", "--hbm-gb", "4", "--device", "cuda", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    cached, *_, uncached = report["host_memory"]
    assert cached["tables"] == ["huge"] and cached["fits"] and uncached["kernel"] == "fused_uvm"
    half = 100_000_000 * 65 * 4 / 2
    assert cached["host_bytes_max"] == pytest.approx(half, rel=0.01)
    assert 0.2 * half < cached["tables_bytes_max"] < 0.3 * half and uncached["tables_bytes_max"] < 0.01 * half


def test_json_and_several_world_sizes(planned_file, capsys):
    path = planned_file(config([("a", 30_000_000, 64), ("b", 1_000, 8)]))
    argv = ["plan", path, "--world-size", "1,2,32", "--hbm-gb", "8", "--device", "cuda"]
    assert main(argv) == 0  # 2 fits
    text = capsys.readouterr().out
    assert "world sizes asked for" in text and "smallest world size that fits: 2" in text and "not validated on hardware" in text
    assert "data.num_streams of at least 32 (now 16)" in text
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert [(w["world_size"], w["fits"]) for w in report["worlds"]] == [(1, False), (2, True), (32, True)]
    assert report["shown"] == report["smallest_world_size"] == 2 and "not validated" in report["predictions"]
    shown = report["worlds"][1]
    assert shown["step_ms"] == pytest.approx(sum(part["slowest"] for part in shown["time_ms"].values()))
    assert shown["plan"]["world_size"] == 2 and {t["table"] for t in shown["plan"]["tables"]} == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--world-size", "0"], "--world-size 0: a world has at least 1 rank"),
        (["--world-size", "12"], "8 ranks per node do not divide a world of 12; give --ranks-per-node a divisor, or --world-size 8 or 16"),
        (["--world-size", "2", "--ranks-per-node", "0"], "--ranks-per-node 0: a node has at least 1 rank"),
        (["--world-size", "2", "--hbm-gb", "-1"], "--hbm-gb -1: must be above 0"),
        (["--world-size", "2", "--measure"], "add --device cpu"),
        (["--world-size", "2", "--measure", "--device", "cpu"], "/nowhere"),
        (["--world-size", "2", "--device", "cpu", "optimizer.tables.kind=adam"], "optimizer adam has no kernel on cpu"),
    ],
)
def test_bad_input_is_one_sentence(planned_file, capsys, arguments, sentence):
    assert main(["plan", planned_file(config()), *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.startswith("distmtl plan: ") and captured.err.count("\n") == 1 and not captured.out


def test_no_tables():
    c = parse_config({**config().model_dump(mode="json"), "features": [{"kind": "numeric", "name": "x"}]})
    report = make_report(c, CPU, [2])
    assert report.fits and "there are no tables" in report.text() and json.dumps(report.json(), allow_nan=False)


def test_measured_beside_predicted(tiny_data, tmp_path):
    c = tiny.config(tiny_data, tmp_path / "run")
    measured = run_world(measure, 1, c, CPU, 4)[0]
    assert measured.steps == 7 - 3 and measured.rows == 128
    assert 0 < measured.tables_ms < measured.step_ms and measured.ratio == measured.tables_ms / measured.predicted_ms
    assert measured.predicted_ms == plan_world(c, CPU, 1).step_ms
    assert not (tmp_path / "run").exists()
    report = make_report(c, CPU, [1])
    report.measured = measured
    assert "measured / predicted" in report.text() and json.loads(json.dumps(report.json()))["measured"]["ratio"] == measured.ratio


def test_measured_without_tables(tiny_data, tmp_path):
    c = tiny.config(tiny_data, tmp_path / "run", features=[{"kind": "numeric", "name": "x"}])
    report = make_report(c, CPU, [1])
    report.measured = run_world(measure, 1, c, CPU, 7)[0]
    assert report.measured.tables_ms == 0 < report.measured.step_ms and report.measured.ratio is None
    assert report.text() and json.dumps(report.json(), allow_nan=False)


@pytest.mark.parametrize(("memory", "hbm"), [("host", 0.01), ("cached", 0.3)])
def test_a_table_may_lie_in_host_memory(memory, hbm):
    """Then a device that is smaller than it will do; on CPU nothing changes. `hbm`: at most this share of the table on the device."""
    sizes, cuda = [("huge", 100_000_000, 64), ("small", 1_000, 64)], Hardware.of("cuda", hbm_gb=12)
    asked = config(sizes, tables={"huge": {"memory": memory}})
    assert not plan_world(config(sizes), cuda, 1).fits
    world = plan_world(asked, cuda, 1)
    assert world.fits and {t.table: t.memory for t in world.planned} == {"huge": memory, "small": "device"}
    tables = sum(world.memory[k][0] for k in ("weights", "optimizer", "buffers"))
    assert tables < hbm * 4 * 65 * 100_000_000 < world.host[0] / 3 and f"table_wise, {memory}" in plan_text(world.planned, 1)
    assert (
        plan_world(asked, Hardware.of("cpu", ddr_gb=64), 1).planned == plan_world(config(sizes), Hardware.of("cpu", ddr_gb=64), 1).planned
    )
