"""The model card: what an export was trained on and how good it is, for people (Mitchell et al. 2019, "Model Cards")."""

from __future__ import annotations

import json

from distmtl.checkpoint import Checkpoint
from distmtl.config import Config
from distmtl.exporting.manifest import Manifest
from distmtl.scores import meaning


def card(manifest: Manifest, found: Checkpoint, config: Config) -> str:
    """Markdown."""
    data = found.manifest["data"]
    rows = sum(rows for _, rows in data["files"].values())
    lines = [
        f"# {manifest.name}",
        "",
        f"A {config.model.kind} model of {len(config.tasks)} tasks: {', '.join(f'{t.name} ({t.kind})' for t in config.tasks)}.",
        "",
        "| task | its score |",
        "|---|---|",
        *(f"| {t.name} | {meaning(config, t).replace('|', chr(92) + '|')} |" for t in config.tasks),
        "",
        "## Training",
        "",
        f"- data: {config.data.train}, {rows:,} rows in {len(data['files'])} files, digest {data['digest']}",
        f"- checkpoint {manifest.checkpoint}: step {manifest.step:,}, {manifest.rows_trained:,} rows trained, "
        f"batch {config.train.global_batch_size:,}, precision {config.train.precision}, seed {config.run.seed}",
        f"- weighting {config.weighting.kind}; calibrated: {', '.join(manifest.calibrations) or 'no task'}",
        f"- {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}; git {manifest.git}",
        "",
        "## Tables",
        "",
        f"Rows as {manifest.row_format}.",
        "",
        "| table | rows | columns |",
        "|---|---|---|",
        *(f"| {name} | {rows:,} | {columns} |" for name, (rows, columns) in config.tables_read.items()),
        "",
        *_metrics(found),
    ]
    return "\n".join(lines) + "\n"


def _metrics(found: Checkpoint) -> list[str]:
    """What the run measured of this checkpoint, if it got that far."""
    file = found.path.parent.parent / "result.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if (result.get("best_step") or result.get("steps")) != found.step:
        return ["## Metrics", "", "Not measured: the run had not ended, or its best checkpoint is another."]
    lines = ["## Metrics", "", "| split | task | metric | value |", "|---|---|---|---|"]
    for split, tasks in result["metrics"].items():
        for task, metrics in tasks.items():
            lines += [f"| {split} | {task} | {name} | {value:,.6g} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return lines
