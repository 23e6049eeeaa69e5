"""ESMM (Ma et al. 2018) and ESCM² (Wang et al. 2022) where the conversion rate of every impression is known: `distmtl synth`'s funnel.

    .venv/bin/python -m benchmarks.reproduce.funnel [--seeds 5] [--rows 600000] [--processes 2] [--out …]

naive    the conversion alone, on clicked rows (the click counts 0)
shared   the click and the conversion on clicked rows, embeddings shared: the fair baseline
ESMM, ESCM²-IPW, ESCM²-DR    the same networks
oracle   the conversion alone, on all impressions: what would have come out had everybody clicked

Without and with a hidden cause of both clicks and conversions (confounding 1). Of P(conversion | click) on ALL test impressions:
AUC against the true probabilities, and bias Σp / Σtruth - 1. A network per task, none tuned. A seed draws the log and the weights.

Single results are kept in build/reproduce/funnel.jsonl: start it again and it goes on. Writes funnel.json and funnel.md. 60 runs,
about 10 minutes on 2 quiet cores.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.intervals import Interval, difference, interval, table
from benchmarks.quality import run
from benchmarks.reproduce.kept import Case, arguments, measured, write
from distmtl.data.output import SPLITS
from distmtl.data.planted import BLOCK
from distmtl.data.synthetic import World, write_log

CONFOUNDING = (0.0, 1.0)
UNBIASED = 0.05
NETWORK = {"kind": "single_task", "bottom": [128, 64]}
CLICK: dict[str, Any] = {"kind": "binary", "name": "click"}
CONVERSION: dict[str, Any] = {"kind": "binary", "name": "conversion", "true_probability_entire": "p_conversion_all"}
METHODS: dict[str, dict[str, Any]] = {
    "shared": {"model": NETWORK},
    "naive": {"model": NETWORK, "tasks": [CLICK | {"weight": 0}, CONVERSION | {"parents": ["click"]}]},
    "ESMM": {"model": {"kind": "esmm", "network": NETWORK}},
    "ESCM²-IPW": {"model": {"kind": "escm2", "network": NETWORK}},
    "ESCM²-DR": {"model": {"kind": "escm2", "method": "dr", "network": NETWORK}},
    "oracle": {"model": NETWORK, "tasks": [CONVERSION | {"label": "conversion_all"}]},
}


class Potential(World):
    """With a column `conversion_all`: a conversion had the impression been clicked. Given x it is distributed as that, but its hidden
    noise is its own: it tells nothing of the row's click."""

    def block(self, split: str, index: int) -> pa.Table:
        place = SPLITS.index(split)
        x = self.impressions(np.random.default_rng((self.seed, place, index)))
        p = self.marginal(self.logit("conversion", x))
        happens = np.random.default_rng((self.seed, place, index, 1)).random(BLOCK) < p
        return super().block(split, index).append_column("conversion_all", pa.array(happens.astype(np.int8)))


def measure(case: Case, rows: int) -> dict[str, dict[str, float]]:
    """Confounding, seed → method → figures."""
    confounding, seed = case
    with TemporaryDirectory() as folder:
        world = Potential(seed, confounding=confounding)
        write_log(Path(folder) / "log", world, rows=rows)
        out = {}
        for name, sections in METHODS.items():
            of = run(world, Path(folder) / "log", Path(folder), **sections)[1]["conversion"]
            gap = of["entire_best_possible_auc"] - of["entire_auc"]
            out[name] = {"AUC": of["entire_auc"], "below the best AUC": gap, "bias": of["entire_calibration"] - 1}
        return out


def claims(runs: dict[str, list[dict[str, float]]]) -> list[tuple[str, Interval, bool]]:
    """What the papers say, a difference, and whether it is so."""
    out = []
    for better in ("ESMM", "ESCM²-IPW", "ESCM²-DR"):
        for worse in ("naive", "shared", "ESMM"):
            if better != worse:
                auc = difference(*([r["AUC"] for r in runs[m]] for m in (better, worse)))
                bias = difference(*([abs(r["bias"]) for r in runs[m]] for m in (better, worse)))
                out += [
                    (f"{better} ranks better than {worse}", auc, auc.side() > 0),
                    (f"{better} is less biased than {worse}", bias, bias.side() < 0),
                ]
        own = interval([r["bias"] for r in runs[better]])
        out.append((f"{better} is unbiased: within ± {UNBIASED:.0%}", own, own.low > -UNBIASED and own.high < UNBIASED))
    return out


def main() -> None:
    p = arguments(__doc__, "funnel", seeds=5)
    p.add_argument("--rows", type=int, default=600_000, help="of a log, all splits together")
    a = p.parse_args()
    kept = a.kept.with_stem(f"{a.kept.stem}-{a.rows}")
    found, commits = measured(kept, partial(measure, rows=a.rows), [(c, s) for s in range(a.seeds) for c in CONFOUNDING], a.processes)
    report: dict[str, Any] = {"rows": a.rows, "seeds": a.seeds, "confounding": {}}
    lines = [
        "# Conversion of every impression",
        "",
        f"`python -m benchmarks.reproduce.funnel`; {a.rows:,} rows, {a.seeds} seeds, mean with its 95 % interval; differences are paired.",
    ]
    for c in CONFOUNDING:
        runs = {m: [found[c, s][m] for s in range(a.seeds)] for m in METHODS}
        report["confounding"][str(c)], rows = table(runs, "shared")
        lines += ["", f"## Confounding {c:g}", "", *rows, "", "| claim | difference | verdict |", "|---|---|---|"]
        lines += [f"| {claim} | {of.text(4, '+')} | {'reproduced' if so else 'not reproduced'} |" for claim, of, so in claims(runs)]
    write(a.out, "funnel", report, lines, commits)


if __name__ == "__main__":
    main()
