"""Ma et al. 2018, sections 3.2 and 5.1: two regressions of chosen correlation, by shared bottom, OMoE and MMoE of equal size.

    .venv/bin/python -m benchmarks.reproduce.mmoe_synthetic [--seeds 30] [--settings sines-10 …] [--processes 2] [--out benchmarks/results]

Data: u₁ ⊥ u₂ unit vectors in R^100, w₁ = c·u₁, w₂ = c·(ρ·u₁ + √(1-ρ²)·u₂), x ~ N(0, I), and for both tasks with the same α, β ~ N(0, 1)

    y = w·x + Σ_{i ≤ m} sin(αᵢ·w·x + βᵢ) + ε,   ε ~ N(0, 0.01)

The paper says neither c, m nor α, β. Setting sines-10 is c = 1, m = 10 (Tang et al. 2020 on the same data); steep-5 is c = 3, m = 5,
where y turns three times as fast. Models by the paper: 8 experts of 16, towers of 8; a shared bottom of 113 = 13056 / (100 + 16).
A seed draws u, α, β, all rows and all weights; its three correlations and all of its models share them. Every row is seen once:
2000 steps of 256, Adam. Held-out rows choose the learning rate of every model and seed, others test it; mean squared error over
both tasks, of which 0.01 is noise.

Results are kept in build/reproduce/mmoe_synthetic.jsonl: start it again and it goes on. Writes mmoe_synthetic.json and mmoe_synthetic.md.
810 runs a setting, about 20 minutes on 2 quiet cores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.intervals import Interval, interval, ratio
from benchmarks.reproduce.kept import Case, arguments, measured, write
from distmtl.model.experts import Output, Tower
from distmtl.model.layout import Features
from distmtl.model.mmoe import MMoE
from distmtl.model.multitask import initialise_dense
from distmtl.model.omoe import OMoE
from distmtl.model.shared_bottom import SharedBottom

WIDTH, TASKS, TOWER, NOISE = 100, 2, 8, 0.1
STEPS, ROWS, HELD_OUT = 2000, 256, 8192
CORRELATIONS, RATES = (0.5, 0.9, 1.0), (1e-4, 1e-3, 1e-2)
SETTINGS = {"sines-10": (1.0, 10), "steep-5": (3.0, 5)}  # c, m
MODELS = ("shared bottom", "OMoE", "MMoE")
SAME = 1.1  # a ratio between 1 / SAME and SAME is "almost no difference"


class Synthetic:
    """The two tasks of a seed."""

    def __init__(self, setting: str, seed: int, correlation: float):
        self.random = torch.Generator().manual_seed(seed)
        scale, sines = SETTINGS[setting]
        u = torch.linalg.qr(torch.randn(WIDTH, 2, generator=self.random))[0]
        second = correlation * u[:, 0] + math.sqrt(1 - correlation**2) * u[:, 1]
        self.w = scale * torch.stack([u[:, 0], second], dim=1)
        self.a, self.b = torch.randn(2, sines, generator=self.random)

    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        """x (n, WIDTH), y (n, TASKS)"""
        x = torch.randn(n, WIDTH, generator=self.random)
        z = x @ self.w
        y = z + torch.sin(z[:, :, None] * self.a + self.b).sum(2)
        return x, y + NOISE * torch.randn(n, TASKS, generator=self.random)


class Model(nn.Module):
    """forward: (B, WIDTH) → (B, TASKS)"""

    def __init__(self, name: str, seed: int):
        super().__init__()
        self.sharing: Any
        match name:
            case "shared bottom":
                self.sharing = SharedBottom(WIDTH, TASKS, [113])
            case "OMoE":
                self.sharing = OMoE(WIDTH, TASKS, 8, [16])
            case "MMoE":
                self.sharing = MMoE(WIDTH, TASKS, 8, [16])
        self.towers = nn.ModuleList(Tower(self.sharing.output_width, [TOWER], Output(TOWER)) for _ in range(TASKS))
        initialise_dense(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([tower(h) for tower, h in zip(self.towers, self.sharing(Features((x,))), strict=True)], dim=1)


def error(model: Model, x: Tensor, y: Tensor) -> list[float]:
    """Mean squared, of each task."""
    with torch.no_grad():
        return (model(x) - y).square().mean(0).tolist()


def measure(case: Case) -> dict[str, Any]:
    """Setting, seed, correlation → model → learning rate → held-out and test error of each task."""
    setting, seed, correlation = case
    data = Synthetic(setting, seed, correlation)
    held_out, test = data.rows(HELD_OUT), data.rows(HELD_OUT)
    batches = [data.rows(ROWS) for _ in range(STEPS)]
    figures: dict[str, Any] = {"label correlation": float(torch.corrcoef(test[1].T)[0, 1])}
    for name in MODELS:
        figures[name] = {}
        for rate in RATES:
            model = Model(name, seed)
            optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
            for x, y in batches:
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            figures[name][str(rate)] = {"held out": error(model, *held_out), "test": error(model, *test)}
    return figures


# -------------------------------------------------------------------------------------------------------------- what came out

Losses = dict[str, dict[float, list[float]]]  # model → correlation → mean test error of every seed


def losses(runs: dict[tuple[int, float], dict[str, Any]], seeds: int, rate: str) -> Losses:
    """At a learning rate, or at each model's and seed's "best" by the held-out rows."""

    def of(run: dict[str, dict[str, list[float]]]) -> float:
        chosen = min(run, key=lambda r: sum(run[r]["held out"])) if rate == "best" else rate
        return statistics.mean(run[chosen]["test"])

    return {m: {c: [of(runs[s, c][m]) for s in range(seeds)] for c in CORRELATIONS} for m in MODELS}


def claims(of: Losses) -> Iterator[tuple[str, Interval, str]]:
    """What the paper's figure 4 shows, a ratio with its interval, and whether it is so."""
    low, high = CORRELATIONS[0], CORRELATIONS[-1]
    for model in ("MMoE", "OMoE"):
        for c in CORRELATIONS:
            r = ratio(of[model][c], of["shared bottom"][c])
            yield f"{model} is better than the shared bottom at correlation {c}: loss / loss < 1", r, verdict(r, -1)
    for model in ("shared bottom", "OMoE"):
        r = ratio(of[model][low], of[model][high])
        yield f"{model} is worse at low correlation: loss at {low} / at {high} > 1", r, verdict(r, 1)
    r = ratio(of["MMoE"][low], of["MMoE"][high])
    yield f"correlation matters little to MMoE: loss at {low} / at {high} within 1 / {SAME} … {SAME}", r, same(r)
    for model in ("OMoE", "shared bottom"):
        slopes = [[a / b for a, b in zip(of[m][low], of[m][high])] for m in (model, "MMoE")]
        r = ratio(*slopes)
        yield f"it matters more to {model} than to MMoE: ratio of the two ratios > 1", r, verdict(r, 1)
    r = ratio(of["OMoE"][high], of["MMoE"][high])
    yield f"OMoE and MMoE are alike at correlation {high}: loss / loss within 1 / {SAME} … {SAME}", r, same(r)


def verdict(ratio: Interval, wanted: int) -> str:
    side = ratio.side(1.0)
    return (
        "reproduced" if side == wanted else "not reproduced: the opposite" if side else "not reproduced: no difference beyond the interval"
    )


def same(ratio: Interval) -> str:
    inside = ratio.low > 1 / SAME and ratio.high < SAME
    return "reproduced" if inside else "not reproduced: different" if ratio.side(1.0) else "not reproduced: the interval is too wide"


def section(setting: str, runs: dict[tuple[int, float], dict[str, Any]], seeds: int) -> tuple[dict[str, Any], list[str]]:
    """Of the report, and of its text."""
    scale, sines = SETTINGS[setting]
    labels = ", ".join(f"{c}: {statistics.mean(runs[s, c]['label correlation'] for s in range(seeds)):.2f}" for c in CORRELATIONS)
    report: dict[str, Any] = {"seeds": seeds, "losses": {}, "claims": {}}
    lines = [
        "",
        f"## {setting}: c = {scale:g}, m = {sines}, {seeds} seeds",
        "",
        f"Correlation of the labels by that of the weights: {labels}.",
        "",
    ]
    lines += ["| learning rate | model |" + "".join(f" {c} |" for c in CORRELATIONS), "|---|---" + "|---" * len(CORRELATIONS) + "|"]
    verdicts: dict[str, dict[str, tuple[Interval, str]]] = {}
    for rate in ("best", *map(str, RATES)):
        of = losses(runs, seeds, rate)
        report["losses"][rate] = {m: {str(c): asdict(interval(of[m][c])) for c in CORRELATIONS} for m in MODELS}
        lines += [f"| {rate} | {m} |" + "".join(f" {interval(of[m][c]).text()} |" for c in CORRELATIONS) for m in MODELS]
        for claim, r, said in claims(of):
            verdicts.setdefault(claim, {})[rate] = r, said
    report["claims"] = {c: {rate: asdict(r) | {"verdict": said} for rate, (r, said) in by.items()} for c, by in verdicts.items()}
    lines += [
        "",
        "| claim | at the best rate | verdict |" + "".join(f" at {r} |" for r in RATES),
        "|---|---|---" + "|---" * len(RATES) + "|",
    ]
    for claim, by in verdicts.items():
        cells = "".join(f" {by[str(r)][0].text(2)}: {by[str(r)][1].split(':')[0]} |" for r in RATES)
        lines.append(f"| {claim} | {by['best'][0].text(2)} | {by['best'][1]} |{cells}")
    return report, lines


def main() -> None:
    p = arguments(__doc__, "mmoe_synthetic", seeds=30)
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    a = p.parse_args()
    cases = [(name, seed, c) for name in a.settings for seed in range(a.seeds) for c in CORRELATIONS]
    found, commits = measured(a.kept, measure, cases, a.processes)
    report: dict[str, Any] = {"steps": STEPS, "rows of a step": ROWS, "settings": {}}
    lines = [
        "# Two regressions of chosen correlation (Ma et al. 2018)",
        "",
        "`python -m benchmarks.reproduce.mmoe_synthetic`; mean squared error of both tasks (0.01 is noise), mean over the seeds",
        f"with its 95 % interval; {STEPS} steps of {ROWS} rows. Ratios are geometric means of the same seed's.",
        "Best: the learning rate that held-out rows choose.",
    ]
    for name in a.settings:
        runs = {(s, c): found[name, s, c] for s in range(a.seeds) for c in CORRELATIONS}
        report["settings"][name], text = section(name, runs, a.seeds)
        lines += text
    write(a.out, "mmoe_synthetic", report, lines, commits)


if __name__ == "__main__":
    main()
