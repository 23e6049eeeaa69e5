"""Invariant 10: every YAML in configs/ trains for a few steps, and what the README says can be run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml
from worlds import run_world, train_world

from distmtl.__main__ import COMMANDS, main, parse
from distmtl.config import HeadConfig
from distmtl.config_file import load_config
from distmtl.data.synthetic import World, write_log

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The configs, and beside them the logs that they name, small."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_log(folder / "data" / "synthetic", World(), rows=40_000)
    write_log(folder / "data" / "domains", World(domains=3), rows=40_000)
    return folder


def shortened(path: Path, run: Path):
    return load_config(path, [f"run.dir={run}", "train.steps=6", "train.eval_every=3"])


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configs_train(name, checkout, tmp_path):
    result = train_world(shortened(checkout / "configs" / name, tmp_path / "run"), 2)
    assert result["steps"] == 6 and set(result["metrics"]) == {"validation", "test"}
    assert result["metrics"]["test"]["click"]["best_possible_auc"] > 0.75


def test_every_head_has_a_config():
    kinds = {head.model_fields["kind"].annotation.__args__[0] for head in get_args(get_args(HeadConfig)[0])}
    shipped = {yaml.safe_load(path.read_text())["model"]["kind"] for path in (ROOT / "configs").glob("*.yaml")}
    assert kinds - shipped == {"plugin"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "planning").glob("*.yaml")), ids=lambda p: p.stem)
def test_planning_configs_are_planned_as_their_first_lines_say(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = re.search(r"^#\s+distmtl (plan \S+ .*)$", path.read_text(), flags=re.M).group(1)
    assert main(shlex.split(command)) == 0 and str(path.relative_to(ROOT)) in command
    assert "smallest world size that fits" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["mmoe", "ple", "shared_bottom"])
def test_configs_beside_the_synthetic_log_train(head, checkout, tmp_path):
    result = train_world(shortened(checkout / "data" / "synthetic" / f"{head}.yaml", tmp_path / "run"), 2)
    assert result["steps"] == 6


def test_readme_and_docs_name_only_what_exists():
    """Every distmtl command in the documentation parses, in a sentence too, and every linked page is there; `make docs-check` runs them."""
    commands = 0
    for page in [
        *ROOT.glob("README*.md"),
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").glob("*.yaml"),
        *(ROOT / "configs").glob("*/*.yaml"),
    ]:
        text = page.read_text().replace("\\\n", " ").replace("\\|", "|")  # lines that go on, cells of tables
        for found in re.findall(
            r"(?:^    |`|&& |# |-- |-m )"
            rf"(distmtl (?:{'|'.join(COMMANDS)})\b[^`\n#&|]*)",
            text,
            flags=re.M,
        ):
            words = shlex.split(found)[1:]
            if len(words) > 1 or words == ["doctor"]:
                parse(words)
                commands += 1
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    assert commands >= 10


def test_the_commands_of_the_readme_in_order(tmp_path, capsys):
    """synth → config → train (one process, as under torchrun) → evaluate --data, also on data without true probabilities."""
    log, run = tmp_path / "synthetic", tmp_path / "run"
    assert main(["synth", "--out", str(log), "--rows", "20000"]) == 0
    overrides = [f"run.dir={run}", "train.steps=8"]
    assert main(["config", str(log / "mmoe.yaml"), *overrides]) == 0
    train_world(load_config(log / "mmoe.yaml", overrides), 1)
    capsys.readouterr()
    for split, knows in (("test", True), ("train", False)):
        assert run_world(main, 1, ["evaluate", str(run), "--data", str(log / split), "--out", str(tmp_path / "metrics.json")]) == [0]
        metrics = json.loads((tmp_path / "metrics.json").read_text())["data"]
        assert metrics["click"]["auc"] > 0.4 and ("best_possible_auc" in metrics["click"]) == knows


@pytest.mark.parametrize("head", ["mmoe", "ple", "shared_bottom"])
@pytest.mark.parametrize("name", ["census-income", "movielens-1m"])
def test_prepared_configs_train(name, head, prepared, tmp_path):
    result = train_world(load_config(prepared[name] / f"{head}.yaml", [f"run.dir={tmp_path}", "train.steps=3"]), 2)
    assert result["steps"] == 3 and len(result["metrics"]["test"]) >= 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    source = ROOT.parent / "shared" / "data"
    if not source.exists():
        pytest.skip("the public data sets are not on this machine")
    out = tmp_path_factory.mktemp("prepared")
    for name in ("census-income", "movielens-1m"):
        assert main(["prepare", name, "--source", str(source / name.replace("-", "_")), "--out", str(out / name)]) == 0
    return {p.name: p for p in out.iterdir()}
