"""The sections that a run's directory is enough for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from distmtl.config import BinaryTask, MulticlassTask
from distmtl.config_file import flat
from distmtl.health_page import Series
from distmtl.metrics import called
from distmtl.reporting import drawing
from distmtl.reporting.drawing import Line, Map, Panel, Piece
from distmtl.reporting.gathering import Run, config_differences
from distmtl.reporting.page import Plot, Section, Table, cell, series_rows

STRETCHES = 48  # of time in a heat map
PAIRS = 6  # of tasks whose cosine is drawn over time
DRAWN_EXPERTS = 12  # whose load is a line
EVENTS = 200  # newest
PIECES = 30  # tables of a plan that are drawn one by one


def results(runs: Sequence[Run]) -> Section:
    s = Section(
        "results",
        "Results",
        "What the runs came to, as their result.json has it: metrics are of the best checkpoint. AUC, GAUC and PR-AUC are better "
        "higher; logloss, NE, RMSE and MAE lower; calibration is the sum of the predictions over that of the labels, and right at "
        "1.",
    )
    figures: dict[str, Callable[[Run], Any]] = {
        "head": lambda r: r.config.model.kind,
        "weighting": lambda r: r.config.weighting.kind,
        **{k.replace("_", " "): (lambda r, k=k: (r.result or {}).get(k)) for k in OF_RESULT},  # type: ignore[misc]
        "parameters in tables": lambda r: (r.result or {}).get("parameters", {}).get("tables"),
        "dense parameters": lambda r: (r.result or {}).get("parameters", {}).get("dense"),
    }
    rows = [[name, *(cell(of(run)) for run in runs)] for name, of in figures.items()]
    found = list(dict.fromkeys((split, t, m) for r in runs for split, of in r.metrics.items() for t, values in of.items() for m in values))
    metrics = [[*key, *(r.metrics.get(key[0], {}).get(key[1], {}).get(key[2]) for r in runs)] for key in found if key[2] != "slices"]
    names = [run.name for run in runs]
    s.parts += [Table("metrics by split and task", ["split", "task", "metric", *names], metrics, shown=True)]
    s.parts += [Table("how they were made", ["", *names], rows, shown=True)]
    s.missing += [f"{r.name} has not ended: its metrics are the last that its log has." for r in runs if not r.result]
    return s


OF_RESULT = (
    "world_size", "device", "precision", "epochs", "partitions", "steps", "rows", "seconds", "samples_per_second", "best_step", "restarts",
    "skipped", "git",
)  # fmt: skip


def learning(runs: Sequence[Run]) -> Section:
    s = Section(
        "learning",
        "Learning curves",
        "Training loss and validation metrics by step. A training loss that still falls while the validation metric turns for the "
        "worse is over-fitting; curves that still rise at their end want more steps. The dotted line is the best AUC that the data "
        "allow, where they know it. A followed run predicts every partition before it trains it, so that curve is of rows not yet "
        "seen.",
    )
    tasks = list(dict.fromkeys(t.name for r in runs for t in r.config.tasks))
    losses = [Panel(t, "step", unit_of_loss(runs, t), _losses(runs, t)) for t in tasks]
    if any(p.lines for p in losses):
        s.parts += [Plot("Loss of every task", drawing.lines(losses, "loss of every task by step"))]
        s.parts += [_numbers("losses", losses)]
    else:
        s.missing += ["No step was logged yet."]
    measured = [Panel(t, "step", called(headline(runs, t)), _measured(runs, t)) for t in tasks]
    if any(p.lines for p in measured):
        s.parts += [
            Plot("Validation", drawing.lines(measured, "validation metric of every task by step")),
            _numbers("validation", measured),
        ]
    elif not any(r.partitions for r in runs):
        s.missing += ["There is no validation split, or it was not measured yet (train.eval_every)."]
    followed = [r for r in runs if r.partitions]
    if followed:
        names = max(([line["name"] for line in r.partitions] for r in followed), key=len)
        panels = [Panel(t, "partition", called(headline(runs, t)), _followed(followed, t), names=names) for t in tasks]
        s.parts += [Plot("Every partition before it was trained", drawing.lines(panels, "metric of every partition before training on it"))]
        s.parts += [_numbers("partitions", panels)]
    return s


def headline(runs: Sequence[Run], task: str) -> str:
    """The metric that a task is looked at by."""
    return next(t.metrics[0] for r in runs for t in r.config.tasks if t.name == task)


def unit_of_loss(runs: Sequence[Run], task: str) -> str:
    binary = any(isinstance(t, BinaryTask) for r in runs for t in r.config.tasks if t.name == task)
    return "loss (nats)" if binary else "loss"


def trains_by_logloss(run: Run, name: str) -> bool:
    """Whether a task's training loss and its validation logloss are one thing."""
    task = run.config.tasks[run.config.place_of(name)]
    if not isinstance(task, BinaryTask):
        return isinstance(task, MulticlassTask)
    plain = task.pos_weight == 1 and task.focal == 0 and task.kept_negatives == 1 and task.delay is None
    return plain and run.config.space(task) not in ("entire", "joint")


def _losses(runs: Sequence[Run], task: str) -> list[Line]:
    out = []
    for i, run in enumerate(runs):
        trained = [r for r in run.of_kind("train") if task in r["losses"]]
        if trained:
            label = "training" if len(runs) == 1 else run.name
            out.append(Line(label, [r["step"] for r in trained], [r["losses"][task] for r in trained], i))
        seen = [
            r for r in run.of_kind("evaluation") if r["split"] == "validation" and r["metrics"].get(task, {}).get("logloss") is not None
        ]
        if len(runs) == 1 and seen and trains_by_logloss(run, task):
            out.append(Line("validation", [r["step"] for r in seen], [r["metrics"][task]["logloss"] for r in seen], 1))
    return out


def _measured(runs: Sequence[Run], task: str) -> list[Line]:
    out, metric = [], headline(runs, task)
    for i, run in enumerate(runs):
        seen = [r for r in run.of_kind("evaluation") if r["split"] == "validation" and task in r["metrics"]]
        if seen:
            steps = [r["step"] for r in seen]
            label = "validation" if len(runs) == 1 else run.name
            out.append(Line(label, steps, [r["metrics"][task].get(metric) for r in seen], 1 if len(runs) == 1 else i))
            if metric == "auc" and len(runs) == 1 and (best := seen[-1]["metrics"][task].get("best_possible_auc")) is not None:
                out.append(Line("best possible", steps, [best] * len(steps), 2, faint=True))
    return out


def _followed(runs: Sequence[Run], task: str) -> list[Line]:
    out, metric = [], headline(runs, task)
    for i, run in enumerate(runs):
        of = [line["metrics"].get(task, {}) for line in run.partitions]
        places = list(range(len(of)))
        out.append(Line(run.name if len(runs) > 1 else "before training on it", places, [m.get(metric) for m in of], i))
        if metric == "auc" and len(runs) == 1 and any(m.get("best_possible_auc") is not None for m in of):
            out.append(Line("best possible", places, [m.get("best_possible_auc") for m in of], 2, faint=True))
    return out


def _numbers(what: str, panels: Sequence[Panel]) -> Table:
    """The lines of panels, a column each."""
    lines = [(f"{p.title}: {line.label}", line) for p in panels for line in p.lines]
    by = [dict(zip(line.x, line.y, strict=True)) for _, line in lines]
    places = sorted({x for of in by for x in of})
    names = next((p.names for p in panels if p.names), None)
    rows = [[names[int(x)] if names else x, *(of.get(x) for of in by)] for x in places]
    return Table(what, [panels[0].x, *(name for name, _ in lines)], series_rows(rows))


def weights(runs: Sequence[Run]) -> Section:
    s = Section(
        "weights",
        "Balance of the tasks",
        "λ is the mean weight of a task's loss by the weighting method, on top of its own weight: 1 where nothing weighs. A task "
        "whose gradient norm is ten times the others' owns the shared part. Calibration in training should come to 1 soon after "
        "the start.",
    )
    figures = (("λ", "lambda", "λ"), ("gradient norm", "gradient_norm", "‖g‖"), ("calibration in training", "calibration", "Σp / Σy"))
    for run in _with_health(runs, s):
        h = run.history
        assert h
        panels = [
            Panel(title, "step", unit, [Line(t, h.steps, of[key], i) for i, (t, of) in enumerate(h.tasks.items()) if key in of])
            for title, key, unit in figures
        ]
        panels = [p for p in panels if p.lines]
        s.parts += [*_heading(run, runs), Plot("Weights, gradients and calibration by step", drawing.lines(panels, "balance of the tasks"))]
        s.parts += [_numbers(f"balance of the tasks{_of(run, runs)}", panels)]
    return s


def conflict(runs: Sequence[Run]) -> Section:
    s = Section(
        "conflict",
        "Conflict of the tasks",
        "The cosine of two tasks' gradients where what they share ends: below 0 for long, the tasks pull apart, and gradient "
        "surgery, experts of their own or two models may do better; near 0 is the usual case; near 1 they are one task. One value "
        "is of one batch and noisy: read the mean.",
    )
    for run in _with_health(runs, s):
        h = run.history
        assert h
        if not h.cosines:
            s.missing += [f"{run.name} has one task, or its gradients were not looked at: there is no cosine."]
            continue
        names = list(h.tasks)
        pairs = {(a, b): series for a, others in h.cosines.items() for b, series in others.items()}
        means = {pair: _mean(series) for pair, series in pairs.items()}
        matrix = [[1.0 if a == b else means.get((a, b), means.get((b, a))) for b in names] for a in names]
        s.parts += _heading(run, runs)
        maps = [Map("mean over the run", names, names, matrix)]
        s.parts += [Plot("Mean cosine, task × task", drawing.heat_maps(maps, "mean cosine, task by task", "cosine", (-1, 1), "+.2f"))]
        lowest = sorted(pairs, key=lambda pair: 1.0 if (m := means[pair]) is None else m)[:PAIRS]
        lines = [Line(f"{a} – {b}", h.steps, pairs[a, b], i) for i, (a, b) in enumerate(lowest)]
        title = "cosine by step" if len(pairs) <= PAIRS else f"cosine by step, the {PAIRS} pairs lowest in the mean"
        over_time = [Panel(title, "step", "cosine", lines)]
        s.parts += [Plot("Over time", drawing.lines(over_time, title))]
        rows = [[f"{a} – {b}", _mean(v), _last(v), min(known, default=None)] for (a, b), v in pairs.items() for known in [_known(v)]]
        s.parts += [
            Table(f"cosines{_of(run, runs)}", ["tasks", "mean", "last", "least"], rows),
            _numbers(f"cosines by step{_of(run, runs)}", over_time),
        ]
    return s


def gates(runs: Sequence[Run]) -> Section:
    s = Section(
        "gates",
        "Gates",
        "Every expert's share of a task's gates over time, mean over rows; grey where a task does not see it. Entropy 1 means all experts "
        "alike, 0 one expert per row: falling while the shares stay even is specialisation; one share near 1 for all rows is collapse. An "
        "expert whose load (mean share over the tasks) is far below its fair share starves.",
    )
    for run in _with_health(runs, s):
        h = run.history
        assert h
        if not h.gates:
            s.missing += [f"{run.name}: its head ({run.config.model.kind}) has no gates over experts."]
            continue
        series = [(r["step"], r["health"]["gate"]) for r in run.of_kind("train") if (r.get("health") or {}).get("gate")]
        cuts = _stretches(len(series))
        steps = [str(series[last - 1][0]) for _, last in cuts]
        maps = []
        for t, of in h.gates.items():
            shares = [[_mean([g[t][e] for _, g in series[a:b]]) for a, b in cuts] for e in range(len(of))]
            maps.append(Map(t, [str(e) for e in range(len(of))], steps, shares, x="step", y="expert"))
        most = max(v for m in maps for row in m.values for v in row if v is not None)
        s.alarms += [f"{run.name}, step {a['step']:,}{'' if a['stands'] else ' (no longer)'}: {a['text']}." for a in h.alarms]
        s.parts += [*_heading(run, runs)]
        s.parts += [
            Plot("Share of the gates, expert × step", drawing.heat_maps(maps, "share of every task's gates by step", "share", (0, most)))
        ]
        entropy = Panel("gate entropy", "step", "entropy (1: even)", [])
        entropy.lines.extend(Line(t, h.steps, of["gate_entropy"], i) for i, (t, of) in enumerate(h.tasks.items()) if "gate_entropy" in of)
        load = Panel(
            "load of the experts", "step", "share", [Line(f"expert {e}", h.steps, v, i) for i, (e, v) in enumerate(h.load.items())]
        )
        s.parts += [Plot("Entropy", drawing.lines([entropy], "gate entropy by step"))] if entropy.lines else []
        if len(h.load) <= DRAWN_EXPERTS:
            s.parts += [Plot("Load", drawing.lines([load], "load of the experts by step"))]
        heads = ["task", *(f"expert {e}" for e in range(len(next(iter(h.gates.values())))))]
        s.parts += [
            Table(f"gates at the last log line{_of(run, runs)}", heads, [[t, *of] for t, of in h.gates.items()]),
            _numbers(f"entropy by step{_of(run, runs)}", [entropy]),
        ]
        s.parts += [_numbers(f"load by step{_of(run, runs)}", [load])]
    if any(r.history and r.history.gates for r in runs) and not s.alarms:
        s.missing += ["No alarm: no expert starved and no task's gates collapsed at a log line."]
    return s


def speed(runs: Sequence[Run]) -> Section:
    s = Section(
        "speed",
        "Speed and memory",
        "Samples per second over all workers; the share of a step in which the training waited for data (above a few percent the "
        "reader is the limit: more data.prefetch, faster storage); the largest memory of worker 0 so far. The first log line holds "
        "what happens once. Vertical dotted lines are restarts.",
    )
    figures = (("throughput", "samples_per_second", "samples/s", 1.0), ("waiting for data", "data_wait", "% of the time", 100.0),
               ("memory of worker 0", "memory_mb", "MiB", 1.0))  # fmt: skip
    marks = runs[0].restarts if len(runs) == 1 else ()
    panels = []
    for title, key, unit, scale in figures:
        lines = []
        for i, run in enumerate(runs):
            trained = [r for r in run.of_kind("train") if r.get(key) is not None]
            if trained:
                lines.append(Line(run.name, [r["step"] for r in trained], [scale * r[key] for r in trained], i))
        panels.append(Panel(title, "step", unit, lines, marks))
    if any(p.lines for p in panels):
        s.parts += [Plot("Speed and memory by step", drawing.lines(panels, "throughput, data wait and memory")), _numbers("speed", panels)]
    else:
        s.missing += ["No step was logged yet."]
    return s


def failures(runs: Sequence[Run]) -> Section:
    s = Section(
        "failures",
        "Failures and restarts",
        "What the log tells beside its figures: every start, what was said on the way, the end. An attempt after the first went on "
        "from the newest complete checkpoint; what lay behind it was trained again.",
    )
    for run in runs:
        saved = run.of_kind("checkpoint")
        stall = sum(r.get("stall") or 0.0 for r in saved)
        text = f"{len(run.attempts)} start(s), {len(run.restarts)} of them after a failure or stop"
        text += f"; {len(saved)} checkpoint(s), which held the training up for {stall:.2f} s in all"
        s.parts += [f"{run.name}: {text}"]
        rows = [[_when(e), e.get("step"), _said(e)] for e in run.events[-EVENTS:]]
        s.parts += [Table(f"events of {run.name}", ["time (UTC)", "step", "what"], rows, shown=len(rows) <= 12)]
    return s


def _when(event: dict[str, Any]) -> str:
    return datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S") if "time" in event else ""


def _said(event: dict[str, Any]) -> str:
    where = f"[{event['partition']}] " if "partition" in event else ""
    if event["kind"] == "end":
        return f"{where}end: {'stopped' if event['result'].get('stopped') else 'complete'}"
    lines = event["text"].splitlines()
    if event["kind"] == "start":
        return f"{where}start: {'; '.join(lines[:2])}"
    return where + (f"{event['kind']}: " if event["kind"] in ("failed", "stopped") else "") + "\n".join(lines)


def plan(runs: Sequence[Run]) -> Section:
    s = Section(
        "plan",
        "Sharding plan",
        "Which part of which table every rank holds, weights and optimizer state. Bars of about one length are a balanced plan; a "
        "rank that holds far more than the others is the slowest, or the first without memory.",
    )
    for run in runs:
        if not run.plan or not run.plan["tables"]:
            s.missing += [f"{run.name} has no table that is sharded, or no plan.json."]
            continue
        tables = sorted(run.plan["tables"], key=lambda t: -t["mb"])
        shares = [
            (rank, t["table"], t["mb"] * rows * columns / (t["rows"] * t["dim"]), t["kind"])
            for t in tables
            for rank, rows, columns in t["shards"]
        ]
        drawn = {t["table"] for t in tables[:PIECES]}
        pieces = [Piece(*share) for share in shares if share[1] in drawn]
        for rank in range(run.plan["world_size"]):
            rest = [size for r, name, size, _ in shares if r == rank and name not in drawn]
            pieces += [Piece(rank, f"{len(rest)} more", sum(rest), "smaller tables")] if rest else []
        ranks = [f"rank {r}" for r in range(run.plan["world_size"])]
        s.parts += [
            *_heading(run, runs),
            Plot("Tables on ranks", drawing.stacked(pieces, ranks, "MiB: weights and optimizer state", "tables on ranks")),
        ]
        heads = ["table", "rows", "dim", "sharding", "optimizer", "MiB", "ranks"]
        rows = [[t["table"], t["rows"], t["dim"], t["kind"], t["optimizer"], t["mb"], len({x[0] for x in t["shards"]})] for t in tables]
        s.parts += [Table(f"the plan{_of(run, runs)}", heads, rows)]
    return s


def config(runs: Sequence[Run]) -> Section:
    s = Section(
        "config",
        "Configuration",
        "Every key whose value is not the same in all runs, then all keys of every run; – where a run does not have it."
        if len(runs) > 1
        else "All keys of the run, defaults filled in.",
    )
    if len(runs) > 1:
        rows = [[key, *("–" if v is None else str(v) for v in values)] for key, values in config_differences(runs).items()]
        s.parts += [Table("keys that differ", ["key", *(r.name for r in runs)], rows, shown=True)]
    for run in runs:
        rows = [[key, "–" if v is None else str(v)] for key, v in flat(run.config.model_dump(mode="json")).items()]
        s.parts += [Table(f"configuration of {run.name}", ["key", "value"], rows)]
    return s


def _with_health(runs: Sequence[Run], s: Section) -> list[Run]:
    s.missing += [f"{r.name} has logged no health (train.log_every)." for r in runs if r.history is None]
    return [r for r in runs if r.history is not None]


def _heading(run: Run, runs: Sequence[Run]) -> list[str]:
    return [run.name] if len(runs) > 1 else []


def _of(run: Run, runs: Sequence[Run]) -> str:
    """Beside the name of a table, which no other has."""
    return f", {run.name}" if len(runs) > 1 else ""


def _stretches(n: int) -> list[tuple[int, int]]:
    parts = min(n, STRETCHES)
    return [(i * n // parts, (i + 1) * n // parts) for i in range(parts)]


def _known(series: Series) -> list[float]:
    return [v for v in series if v is not None]


def _mean(series: Series) -> float | None:
    return sum(known) / len(known) if (known := _known(series)) else None


def _last(series: Series) -> float | None:
    return known[-1] if (known := _known(series)) else None
