"""The figures of health against numpy and autograd, on several workers, for every head; its alarms; its page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from heads import HEADS, config_for
from torch.nn import functional as F
from worlds import records, run_world, train_world

from distmtl.__main__ import main
from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.health import Alarm
from distmtl.health_page import page, read_history, sparkline

TASKS = [
    {"kind": "binary", "name": "click", "tower": [8]},
    {"kind": "binary", "name": "conversion", "tower": [8], "parents": ["click"]},  # of space entire
    {"kind": "regression", "name": "rating", "tower": [8], "weight": 0.5},
    {"kind": "binary", "name": "weighted", "label": "click", "pos_weight": 3.0, "tower": [8]},
    {"kind": "binary", "name": "thinned", "label": "click", "kept_negatives": 0.25, "tower": [8]},
    {"kind": "binary", "name": "late", "label": "click", "delay": {"kind": "fnw"}, "tower": [8]},
]


def training_of(config: Config, process: Any) -> Any:
    from distmtl.data.splits import open_splits
    from distmtl.loop import Training
    from distmtl.progress import Progress

    training = Training(config, process, open_splits(config), Progress(None, False, print))
    training.model.train()
    return training


def step_and_what_it_should_tell(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step of an epoch, which has padding, through gates that were drawn at random."""
    from distmtl.distributed.process import process_group

    with process_group(config) as process:
        training = training_of(config, process)
        head, step, seen = training.train_model.model.head, training.reader.steps_per_epoch - 1, []
        torch.manual_seed(1)
        with torch.no_grad():
            for p in head.sharing.gates.parameters():
                p.normal_(std=0.5)
        before = copy.deepcopy(head)
        head.register_forward_pre_hook(lambda module, args: seen.append(args[0].x.detach()))
        (batch,) = training.reader.batches(step, step + 1)
        training.health.add(training.pipeline.progress(iter([batch])))
        return training.health.report()[0], by_hand(before, seen[0], batch)


def by_hand(head: Any, x: torch.Tensor, batch: Any) -> dict[str, Any]:
    names, real = [t["name"] for t in TASKS], (batch.rows >= 0).numpy()
    logits = np.stack([(x @ g.weight.T + g.bias).detach().numpy() for g in head.sharing.gates]).astype(np.float64)  # (T, B, E)
    gates = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    entropy = -(gates * np.log(gates)).sum(2)[:, real].mean(1) / np.log(3)
    mean = gates[:, real].mean(1)

    experts = [f.detach().requires_grad_() for f in head.sharing.experts(x)]
    mixed = [sum(torch.tensor(gates[t, :, e, None]).float() * f for e, f in enumerate(experts)) for t in range(len(names))]
    z = [tower(m)[:, 0] for tower, m in zip(head.towers, mixed, strict=True)]
    w, y = batch.weights, torch.where(batch.weights > 0, batch.labels, 0.0)
    both, w_both = y[:, 0] * y[:, 1], torch.where(y[:, 0] > 0, w[:, 1], w[:, 0])
    p_both = z[0].sigmoid() * z[1].sigmoid()
    errors = {
        "click": (F.binary_cross_entropy(z[0].sigmoid(), y[:, 0], reduction="none"), w[:, 0]),
        "conversion": (F.binary_cross_entropy(p_both, both, reduction="none"), w_both),
        "rating": (0.25 * (z[2] - y[:, 2]) ** 2, w[:, 2]),
    }
    gradients = np.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad((e * w).sum() / w.sum(), experts, retain_graph=True)])
            for e, w in errors.values()
        ]
    )
    norms = np.linalg.norm(gradients, axis=1)
    a, b, c = gradients / norms[:, None]
    weighted = torch.exp(z[3]) / 3  # the odds that the labels have
    probabilities = {
        "click": (z[0].sigmoid(), y[:, 0], w[:, 0]),
        "conversion": (p_both, both, w_both),
        "weighted": (weighted / (1 + weighted), y[:, 3], w[:, 3]),
        "thinned": (z[4].sigmoid(), y[:, 4], w[:, 4]),
    }
    return {
        "lambda": dict.fromkeys(names, 1.0),
        "gradient_norm": dict(zip(errors, norms, strict=True)),
        "cosine": {"click": {"conversion": a @ b, "rating": a @ c}, "conversion": {"rating": b @ c}},
        "calibration": {n: ((w * p).sum() / (w * y).sum()).item() for n, (p, y, w) in probabilities.items()},
        "gate": dict(zip(names, mean, strict=True)),
        "gate_entropy": dict(zip(names, entropy, strict=True)),
        "load": {str(e): v for e, v in enumerate(mean.mean(0))},
    }


def test_the_figures_of_a_step_are_those_by_hand(tiny_data, tmp_path):
    model = {"kind": "esmm", "network": {"kind": "mmoe", "num_experts": 3, "expert": [16, 8]}}
    config = tiny.config(tiny_data, tmp_path / "run", tasks=TASKS, model=model, train={"global_batch_size": 112, "log_every": 1})
    ((told, expected),) = run_world(step_and_what_it_should_tell, 1, config)
    assert told.keys() == {*expected, "alarms"} and told["alarms"] == []
    assert told["calibration"].keys() == expected["calibration"].keys()  # none of the task whose labels are late
    for figure in ("lambda", "calibration", "gate_entropy", "load"):
        assert told[figure] == pytest.approx(expected[figure], rel=1e-4), figure
    for name, gates in expected["gate"].items():
        assert told["gate"][name] == pytest.approx(gates.tolist(), rel=1e-4)
    for name, norm in expected["gradient_norm"].items():
        assert told["gradient_norm"][name] == pytest.approx(norm, rel=1e-4)
    for one, others in expected["cosine"].items():
        for other, cosine in others.items():
            assert told["cosine"][one][other] == pytest.approx(cosine, abs=1e-5)


def test_two_workers_tell_what_one_does(tiny_data, tmp_path):
    sgd = {"tables": {"kind": "sgd", "lr": 0.1}, "dense": {"kind": "sgd", "lr": 0.05}}
    configs = [
        tiny.config(tiny_data, tmp_path / str(w), optimizer=sgd, train={"global_batch_size": 128, "log_every": 4, "steps": 24})
        for w in (1, 2)
    ]
    for world_size, config in enumerate(configs, start=1):
        train_world(config, world_size)
    one, two = ([r["health"] for r in records(c, "train")] for c in configs)
    assert len(one) == len(two) == 6
    for a, b in zip(map(numbers, one), map(numbers, two), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


def numbers(value: Any) -> list[float]:
    """All that are in it."""
    if isinstance(value, dict | list):
        return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers(v)]
    return [] if value is None or isinstance(value, str) else [float(value)]


def one_step_of_each(configs: list[Config]) -> list[dict[str, Any]]:
    from distmtl.distributed.process import process_group

    out = []
    for config in configs:
        with process_group(config) as process:
            training = training_of(config, process)
            training.health.add(training.pipeline.progress(training.reader.batches(0, 1)))
            out.append(training.health.report()[0])
    return out


def test_every_head_tells(tiny_data, tmp_path):
    """Also bf16, gradients at the features, a head of one's own, and a task alone."""
    logged = {"global_batch_size": 128, "log_every": 1}
    raw = {kind: config_for(kind, tiny_data, tmp_path / kind).model_dump(mode="json") for kind in HEADS}
    raw |= {"plugin": raw["mmoe"] | {"model": {"kind": "plugin", "target": "test_heads:TwoLinear", "args": {"hidden": 6}}}}
    raw |= {"bf16": raw["mmoe"], "features": raw["mmoe"] | {"weighting": {"kind": "pcgrad", "cut": "features"}}}
    raw |= {"alone": tiny.raw(tiny_data, tmp_path / "alone", tasks=TASKS[2:3])}
    configs = {k: parse_config({**r, "train": {**logged, "precision": "bf16" if k == "bf16" else "fp32"}}) for k, r in raw.items()}
    first, second = run_world(one_step_of_each, 2, list(configs.values()))
    assert first == second
    for kind, told in zip(configs, first, strict=True):
        json.dumps(told, allow_nan=False)
        names = [t.name for t in configs[kind].tasks]
        assert list(told["lambda"]) == list(told["gradient_norm"]) == names, kind
        assert all(norm > 0 for norm in told["gradient_norm"].values()), kind
        assert ("cosine" in told, "calibration" in told) == (kind != "alone", kind != "alone"), kind
        mixes = kind not in ("single_task", "shared_bottom", "aitm", "dbmtl", "star", "pepnet", "plugin")
        assert ("gate" in told) == mixes, kind
        if mixes:
            for gates in told["gate"].values():
                assert sum(g for g in gates if g is not None) == pytest.approx(1, abs=1e-4)
            assert all(0.5 < e <= 1.000001 for e in told["gate_entropy"].values())  # gates start even, but those of home
            assert sum(told["load"].values()) == pytest.approx(1, abs=1e-4)
            assert told["alarms"] == []
    told = dict(zip(configs, first, strict=True))
    assert told["cgc"]["gate"]["conversion"] == pytest.approx([None, 1 / 3, None, 1 / 3, 1 / 3])
    assert [g is None for g in told["home"]["gate"]["rating"]] == [*[True] * 4, False, False, True, True, *[False] * 4]


def alarms_of(config: Config, courses: list[list[float]]) -> list[list[Alarm]]:
    """New alarms of every step, in which the task's gates are a softmax of that bias alone."""
    from distmtl.distributed.process import process_group

    with process_group(config) as process:
        training, out = training_of(config, process), []
        batches = training.reader.batches(0, len(courses))
        for of_tasks in courses:
            for gate, height in zip(training.train_model.model.head.sharing.gates, of_tasks, strict=True):
                with torch.no_grad():
                    gate.weight.zero_()
                    gate.bias.copy_(torch.tensor([height, 0, 0]))
            training.health.add(training.pipeline.progress(batches))
            out.append(training.health.report()[1])
        return out


def test_collapsed_gates_and_starved_experts_are_told_once(tiny_data, tmp_path):
    even, one, slightly, all_of_them = [0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [3.5, 0.0, 0.0], [9.0, 9.0, 9.0]
    courses = [even, one, one, slightly, even, one, all_of_them, all_of_them]
    (alarms,) = run_world(alarms_of, 1, tiny.config(tiny_data, tmp_path / "run"), courses)
    gates = [f"gates of {t}" for t in ("click", "conversion", "rating")]
    assert (
        [[a.subject for a in new] for new in alarms]
        == [
            [],
            gates[:1],
            [],
            [],  # 94 %: not yet over
            [],
            gates[:1],
            ["expert 1", "expert 2", *gates[1:]],
            [],
        ]
    )
    assert "expert 0 gets 100.0% of them" in alarms[1][0].text and "a fair share is 33.3%" in alarms[6][0].text


def test_the_page_of_a_run(tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    model = {"kind": "esmm", "network": {"kind": "cgc", "shared_experts": 1, "task_experts": 1, "expert": [8]}}
    config = tiny.config(tiny_data, run, tasks=TASKS[:3], model=model, train={"global_batch_size": 128, "log_every": 4, "steps": 24})
    train_world(config, 1)
    log = run / "metrics.jsonl"
    with log.open("a") as file:  # as after a failure at step 24, from a checkpoint of step 12
        file.write('{"kind": "start", "step": 12, "text": ""}\n')
        file.write('{"kind": "note", "step": 12, "text": "expert 3 starves", "alarm": "expert 3"}\n{"kind": "train", "step"')
    history = read_history(str(run))
    assert history.steps == [4, 8, 12] and history.of == 24 and history.alarms[0]["stands"] is False
    told = [r["health"] for r in records_before(log, 24) if r["step"] <= 12]
    assert history.tasks["click"]["calibration"] == [h["calibration"]["click"] for h in told]
    assert history.cosines["click"]["rating"] == [h["cosine"]["click"]["rating"] for h in told]

    assert main(["health", str(run)]) == 0
    text = capsys.readouterr().out
    assert text == page(history) + "\n"
    assert "step 12 of 24, 3 log line(s)" in text and "step 12 (no longer): expert 3 starves" in text
    click = text.split("\nclick\n")[1].splitlines()
    assert [line[2:16].strip() for line in click[:5]] == ["λ", "loss", "calibration", "gradient norm", "gate entropy"]
    assert main(["health", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [4, 8, 12]


def records_before(log: Path, step: int) -> list[dict[str, Any]]:
    whole = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    return [r for r in whole if r["kind"] == "train" and r["step"] < step]


def test_there_may_be_nothing_to_show(tmp_path):
    with pytest.raises(DistmtlError, match="is no run: it has no metrics.jsonl"):
        read_history(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "text": ""}\n')
    with pytest.raises(DistmtlError, match="has logged no health yet; it does so every train.log_every steps"):
        read_history(str(tmp_path))


def test_a_sparkline_averages_stretches_and_leaves_gaps():
    assert sparkline([0, 7, None, 3.4]) == "▁█ ▄"
    assert sparkline([float(i // 2) for i in range(8)], columns=4) == "▁▃▆█"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([None]) == " "
