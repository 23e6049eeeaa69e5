"""The sections that ask a checkpoint: how its predictions rank and are calibrated, what it reads, which experts it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from distmtl.metrics import called
from distmtl.reporting import drawing
from distmtl.reporting.drawing import Bars, Line, Map, Panel
from distmtl.reporting.examination import Drop, Examination
from distmtl.reporting.page import Plot, Section, Table, series_rows

Examined = Mapping[str, Examination | str]  # run → what was found, or why nothing was looked for

SHOWN = 30  # features that have a bar


def found_of(examined: Examined, s: Section) -> dict[str, Examination]:
    reasons = {e: [name for name, of in examined.items() if of == e] for e in examined.values() if isinstance(e, str)}
    s.missing += [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return {name: e for name, e in examined.items() if isinstance(e, Examination)}


def tasks_of(found: Mapping[str, Examination]) -> list[str]:
    return list(dict.fromkeys(t for e in found.values() for t in e.curves))


def calibration(examined: Examined) -> Section:
    s = Section(
        "calibration",
        "Calibration",
        "Rows in ten bins of about equal weight by prediction: what was predicted, and what share of them happened. On the "
        "diagonal the predictions are right; below it they are too high. The band is Wilson's 95 % interval: a bin whose band "
        "holds the diagonal may be right.",
    )
    found = found_of(examined, s)
    panels, rows = [], []
    for task in tasks_of(found):
        most = max(v for e in found.values() if task in e.curves for b in e.curves[task].bins for v in (b.predicted, b.observed))
        lines = [Line("right", [0, most], [0, most], 2, faint=True)]
        for i, (name, e) in enumerate(found.items()):
            if task in e.curves:
                bins = e.curves[task].bins
                lines.append(Line(name, [b.predicted for b in bins], [b.observed for b in bins], i, span=[(b.low, b.high) for b in bins]))
                rows += [[name, task, b.rows, b.predicted, b.observed, b.low, b.high] for b in bins]
        panels.append(Panel(task, "predicted probability", "share that happened", lines, square=True))
    return _finish(s, panels, "calibration curves", [Table("calibration", BIN_HEADS, rows)])


BIN_HEADS = ["run", "task", "rows", "predicted", "observed", "interval from", "to"]


def ranking(examined: Examined) -> Section:
    s = Section(
        "ranking",
        "ROC and precision",
        "The ROC curve, whose area is the AUC: the higher above the dotted diagonal, the better positives are ranked before "
        "negatives. Then precision by recall, whose area is PR-AUC: the dotted line is the share of positives, what a random order "
        "gives.",
    )
    found = found_of(examined, s)
    roc, recall, rows, areas = [], [], [], []
    for task in tasks_of(found):
        curves = {name: e.curves[task] for name, e in found.items() if task in e.curves}
        first = next(iter(curves.values()))
        styles = {name: i for i, name in enumerate(found)}
        alone = len(found) == 1
        lines = [Line("random order", [0, 1], [0, 1], 2, faint=True)]
        lines += [Line(name, [x for x, _ in c.roc], [y for _, y in c.roc], styles[name]) for name, c in curves.items()]
        roc.append(
            Panel(f"{task}: AUC {first.auc:.4f}" if alone else task, "false positive rate", "true positive rate", lines, square=True)
        )
        lines = [Line("random order", [0, 1], [first.base_rate] * 2, 2, faint=True)]
        lines += [Line(name, [x for x, _ in c.recall], [y for _, y in c.recall], styles[name]) for name, c in curves.items()]
        recall.append(Panel(f"{task}: PR-AUC {first.pr_auc:.4f}" if alone else task, "recall", "precision", lines, square=True))
        for name, c in curves.items():
            areas.append([name, task, c.auc, c.pr_auc, c.base_rate])
            rows += [[name, task, "ROC", x, y] for x, y in series_rows(c.roc)]
            rows += [[name, task, "precision", x, y] for x, y in series_rows(c.recall)]
    s = _finish(s, roc, "ROC curves", [])
    s = _finish(s, recall, "precision by recall", [])
    if areas:
        s.parts += [Table("areas", ["run", "task", "AUC", "PR-AUC", "share of positives"], areas)]
        s.parts += [Table("curves", ["run", "task", "curve", "x", "y"], rows)]
    return s


def _finish(s: Section, panels: Sequence[Panel], title: str, tables: Sequence[Table]) -> Section:
    if panels:
        s.parts += [Plot(title.capitalize() if title.islower() else title, drawing.lines(panels, title)), *tables]
    elif not s.missing:
        s.missing += ["There is no binary task of which these rows have labels of both classes."]
    return s


def ablation(examined: Examined) -> Section:
    s = Section(
        "ablation",
        "Experts, one taken away",
        "How much worse a task's metric is without an expert: its gates are set to 0 and those of the others as much larger. Near "
        "0: the task does not need it; the same expert high in all rows of a column is shared knowledge, high in one a specialist; "
        "below 0: it is better off without. · where a task does not mix it, or has no other. Of several levels the last one's "
        "experts.",
    )
    for name, e in found_of(examined, s).items():
        if not e.ablation:
            s.missing += [f"{name}: its head has no gates over experts that one could be taken away from."]
            continue
        s.parts += [name] if len(examined) > 1 else []
        experts = [str(x) for x in e.ablation]
        for metric in dict.fromkeys(e.headline.values()):
            tasks = [t for t, m in e.headline.items() if m == metric]
            values = [[None if (v := drop[t]) is None else 1000 * v for drop in e.ablation.values()] for t in tasks]
            most = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
            maps = [Map("without expert …", tasks, experts, values, x="expert", y="task")]
            drawn = drawing.heat_maps(
                maps, f"{called(metric)} lost without every expert", f"{called(metric)} lost × 1000", (-most, most), "+.1f"
            )
            s.parts += [Plot(f"{called(metric)} lost, × 1000, task × expert", drawn)]
        heads = ["task", "metric", "whole", *(f"without {x}" for x in experts)]
        rows = [
            [t, called(m), e.metrics[t].get(m), *(None if (v := d[t]) is None else v for d in e.ablation.values())]
            for t, m in e.headline.items()
        ]
        s.parts += [Table(f"what is lost without an expert, {name}", heads, rows)]
    return s


def importance(examined: Examined) -> Section:
    s = Section(
        "importance",
        "What the model reads",
        "Permutation importance: how much worse a task's metric is when a feature's values are those of other rows (Breiman 2001). "
        "The bar is the mean of three permutations, the line their span. Near 0 the model does not use the feature, or has another "
        "that says the same; features that read one column are permuted together.",
    )
    for name, e in found_of(examined, s).items():
        means: dict[str, Drop] = {f: {t: _mean([d[t] for d in drops]) for t in e.headline} for f, drops in e.importance.items()}
        order = sorted(means, key=lambda f: -max((v for v in means[f].values() if v is not None), default=0.0))
        shown = order[:SHOWN]
        panels = []
        for t, m in e.headline.items():
            of = [[v for d in e.importance[f] if (v := d[t]) is not None] or [0.0] for f in shown]
            panels.append(Bars(t, f"{called(m)} lost", shown, [means[f][t] for f in shown], [min(v) for v in of], [max(v) for v in of]))
        s.parts += [name] if len(examined) > 1 else []
        title = f"the {SHOWN} features of {len(order)} that matter most" if len(order) > SHOWN else "every feature"
        s.parts += [Plot(f"Permutation importance: {title}", drawing.bars(panels, f"permutation importance: {title}"))]
        heads = ["feature", *(f"{t}: {called(m)} lost" for t, m in e.headline.items())]
        s.parts += [Table(f"permutation importance, {name}", heads, [[f, *(means[f][t] for t in e.headline)] for f in order])]
    return s


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def slices(examined: Examined) -> Section:
    s = Section(
        "slices",
        "Slices",
        "The metrics of parts of these rows: by domain, and by how often training saw a row's id (0 and 1-4 times: cold; a user's "
        "slice is the user's activity). Rows in which a task has no label are not counted.",
    )
    for name, e in found_of(examined, s).items():
        if not e.slices:
            s.missing += [f"{name}: no slices were asked for (--slices FEATURE[,…])."]
        for feature, of in e.slices.items():
            rows: list[list[Any]] = []
            for t, m in e.headline.items():
                rows += [
                    [t, place, of_task["rows"], of_task.get("positives"), of_task.get(m), of_task.get("calibration")]
                    for place, metrics in [("all", e.metrics), *of.items()]
                    if (of_task := metrics[t])["rows"]
                ]
            metrics_named = " / ".join(dict.fromkeys(map(called, e.headline.values())))
            heads = ["task", "slice", "rows", "positives", metrics_named, "calibration"]
            s.parts += [Table(f"{name} by {feature}" if len(examined) > 1 else f"by {feature}", heads, rows, shown=True)]
    return s
