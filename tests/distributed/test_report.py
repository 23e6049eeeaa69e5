"""distmtl report: its numbers are those of the run's files and of independent computations; its page is whole, offline and legible."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import partitioned
import pytest
import tiny
import torch
from heads import HEADS, config_for
from pages import Page, number
from sklearn.metrics import roc_auc_score
from worlds import records, run_world, train_world

from distmtl import loop
from distmtl.__main__ import main
from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.following import Until, follow
from distmtl.model.head import Head
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense
from distmtl.reporting import examination
from distmtl.reporting.curves import curves_of
from distmtl.reporting.examination import Examiner, examine, spread_rows, subject
from distmtl.reporting.gates import gated, without_expert
from distmtl.reporting.gathering import names_of, read_run
from distmtl.reporting.report import report
from distmtl.run_directory import config_of

SECTIONS = (
    "results", "learning", "calibration", "ranking", "weights", "conflict", "gates", "ablation", "importance", "slices", "speed",
    "failures", "plan", "config",
)  # fmt: skip


def silent(text: str) -> None:
    pass


def config_with_noise(folder: Path, run: Path, **sections):
    """tiny's, and `domain`, which no label depends on; `x` moves clicks more than anything else."""
    optimizer = {"tables": {"kind": "rowwise_adagrad", "lr": 0.05}, "dense": {"kind": "adamw", "lr": 0.01}}
    raw = tiny.raw(folder, run, optimizer=optimizer, **sections)
    raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": 4})
    return parse_config(raw)


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """Two attempts of one run: 40 steps, and on to 60."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    train = {"global_batch_size": 128, "log_every": 5, "eval_every": 20, "epochs": 3}
    for steps in (40, 60):
        train_world(config_with_noise(tiny_data, folder, train={**train, "steps": steps}), 2)
    return folder


@pytest.fixture(scope="module")
def file(run) -> Path:
    out = run.parent / "run.html"
    assert main(["report", str(run), "--out", str(out), "--slices", "user,domain="]) == 0
    return out


@pytest.fixture(scope="module")
def page(file) -> Page:
    return Page(file.read_text())


@pytest.fixture(scope="module")
def found(run):
    return run_world(examine_here, 1, str(run))[0]


def examine_here(path: str, rows: int = examination.ROWS):
    return examine(subject(read_run(path, "run")), rows, say=silent)


def test_a_page_is_one_small_file_that_loads_nothing(file, page):
    html = file.read_text()
    assert len(html) < 5_000_000 and "<script" not in html
    assert all(r.startswith(("#", "data:")) for r in page.references if r), page.references
    assert "://" not in re.sub(r">[^<]*<", "><", html), "no address in any tag"
    assert len(page.names) == len(set(page.names)), "an id is there twice"
    assert set(SECTIONS) <= set(page.names) and all(f'href="#{name}"' in html for name in SECTIONS)
    assert len(page.labels) >= 12 and all(page.labels)


def test_metrics_and_curves_are_those_of_the_files(run, page):
    result = json.loads((run / "result.json").read_text())
    heads, *rows = page.tables["metrics by split and task"]
    assert heads == ["split", "task", "metric", "run"]
    want = [(s, t, m, v) for s, of in result["metrics"].items() for t, values in of.items() for m, v in values.items()]
    assert [tuple(row[:3]) for row in rows] == [w[:3] for w in want]
    assert [number(row[3]) for row in rows] == pytest.approx([w[3] for w in want], rel=1e-5)

    config = config_of(run)
    trained, seen = records(config, "train"), [r for r in records(config, "evaluation") if r["split"] == "validation"]
    losses = page.columns("losses")
    at = {step: i for i, step in enumerate(losses["step"])}
    for r in trained:
        assert number(losses["click: training"][at[str(r["step"])]]) == pytest.approx(r["losses"]["click"], rel=1e-5)
    measured = page.columns("validation")
    assert measured["step"] == list(dict.fromkeys(str(r["step"]) for r in seen)) and len(measured["step"]) >= 3
    for i, step in enumerate(measured["step"]):
        last = [r for r in seen if str(r["step"]) == step][-1]
        assert number(measured["click: validation"][i]) == pytest.approx(last["metrics"]["click"]["auc"], rel=1e-5)
    balance = page.columns("balance of the tasks")
    for r in trained:
        i = balance["step"].index(str(r["step"]))
        for task, norm in r["health"]["gradient_norm"].items():
            assert number(balance[f"gradient norm: {task}"][i]) == pytest.approx(norm, rel=1e-5)
    speed = page.columns("speed")
    assert [number(v) for v in speed["throughput: run"]] == pytest.approx([r["samples_per_second"] for r in trained], rel=1e-5)
    assert [number(v) for v in speed["waiting for data: run"]] == pytest.approx([100 * r["data_wait"] for r in trained], rel=1e-5)


def test_restarts_and_the_plan_are_told(run, page):
    assert read_run(str(run), "run").restarts == [40]
    assert "2 start(s), 1 of them after a failure or stop" in page.sections["failures"]
    plan = json.loads((run / "plan.json").read_text())
    rows = {row[0]: row for row in page.tables["the plan"][1:]}
    assert {t["table"]: t["mb"] for t in plan["tables"]} == pytest.approx({name: number(row[5]) for name, row in rows.items()}, rel=1e-5)


def test_the_area_of_a_curve_is_the_metric(run, page, found):
    """Of all rows of the validation split, which the result's metrics are of."""
    metrics = json.loads((run / "result.json").read_text())["metrics"]["validation"]
    assert found.rows == found.of == tiny.ROWS["validation"] and set(found.curves) == {"click", "conversion"}
    for row in page.tables["areas"][1:]:
        assert (number(row[2]), number(row[3])) == pytest.approx((metrics[row[1]]["auc"], metrics[row[1]]["pr_auc"]), rel=1e-5)
    for task, curves in found.curves.items():
        assert (curves.auc, curves.pr_auc) == pytest.approx((metrics[task]["auc"], metrics[task]["pr_auc"]), rel=1e-6)
        fpr, tpr = np.array(curves.roc).T
        assert np.trapezoid(tpr, fpr) == pytest.approx(curves.auc, abs=2e-3), "also with points left out"
        rows = sum(b.rows for b in curves.bins)
        assert rows == metrics[task]["rows"] and all(b.low <= b.observed <= b.high for b in curves.bins)


def test_curves_of_tied_and_weighted_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    scores, y, w = rng.integers(-3, 3, 500) / 2, (rng.random(500) < 0.3).astype(float), rng.uniform(0.1, 2, 500)
    got = curves_of(scores, y, w)
    assert got.auc == pytest.approx(roc_auc_score(y, scores, sample_weight=w), rel=1e-9)
    assert sum(b.observed * b.rows for b in got.bins) > 0 and got.base_rate == pytest.approx(w @ y / w.sum())
    assert curves_of(scores, np.zeros(500), w) is None


def test_a_planted_feature_matters_and_an_unused_one_does_not(found):
    def mean(feature: str) -> float:
        return float(np.mean([drop["click"] for drop in found.importance[feature]]))

    assert mean("x_bucket, x") > 0.05, "features that read one column are permuted together"
    assert abs(mean("domain")) < 0.01
    assert found == run_world(examine_here, 1, found.checkpoint.rpartition("/checkpoints")[0])[0], "seeds are fixed"


def test_ablation_is_a_mixture_of_the_other_experts(found, run):
    """mmoe computed from its weights, with one gate set to 0 and the others divided by their sum."""
    want = run_world(ablated_by_hand, 1, str(run))[0]
    assert found.ablation.keys() == want.keys() == {0, 1, 2}
    for expert, drops in want.items():
        assert found.ablation[expert]["click"] == pytest.approx(drops, abs=1e-6)
    assert max(abs(d["click"]) for d in found.ablation.values()) > 1e-4


def ablated_by_hand(path: str) -> dict[int, float]:
    from distmtl.distributed.process import process_group
    from distmtl.evaluation import load_model

    what = subject(read_run(path, "run"))
    with process_group(what.config) as process:
        model, fitted = load_model(what.found, what.config, process)
        model.eval()
        seen = []
        model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].x.detach()))
        scorer = Examiner(model, what.config, what.dataset, process, fitted)
        (batch,) = scorer.see(spread_rows(what.dataset, scorer.collate.columns, 10_000)).batches
        head, x = model.head, seen[0]
        experts, gate, tower = head.sharing.experts, head.sharing.gates[0], head.towers[0]
        with torch.no_grad():
            h = [x] * 3
            for weight, bias in zip(experts.weights, experts.biases, strict=True):
                h = [(v @ weight[e].T + bias[e]).relu() for e, v in enumerate(h)]
            g = (x @ gate.weight.T + gate.bias).softmax(1)

            def auc(g: torch.Tensor) -> float:
                z = sum(g[:, [e]] * h[e] for e in range(3))
                for layer in tower.hidden:
                    z = layer(z).relu()
                return roc_auc_score(batch.labels[:, 0], tower.output(z)[:, 0], sample_weight=batch.weights[:, 0])

            whole, out = auc(g), {}
            for e in range(3):
                rest = g.clone()
                rest[:, e] = 0
                out[e] = whole - auc(rest / rest.sum(1, keepdim=True))
    return out


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_without_an_expert_its_gates_are_0_and_then_all_is_as_before(kind, tiny_data, tmp_path):
    config = config_for(kind, tiny_data, tmp_path)
    layout = Layout.of(config)
    head = Head(config, layout)
    initialise_dense(head, 1)
    of_tasks = gated(head)
    if kind in ("single_task", "shared_bottom", "aitm", "dbmtl", "star", "pepnet"):
        assert not of_tasks
        return
    torch.manual_seed(0)
    with torch.no_grad():
        for gate in {g for of in of_tasks for g in of.gates}:
            torch.nn.init.normal_(gate.weight, std=0.3)
    x = torch.randn(32, layout.width)
    features = Features(tuple(x + i for i in range(config.copies)))

    def gates() -> torch.Tensor:
        head.train()
        head(features)
        return head.mixture.gates

    before = gates()
    experts = before.shape[1]
    assert len(of_tasks) == len(config.tasks) and {e for of in of_tasks for e in of.experts} == set(range(experts))
    for expert in range(experts):
        with without_expert(of_tasks, expert) as lose:
            after = gates()
        for t, loses in enumerate(lose):
            row = min(t, len(before) - 1)  # omoe has one gate
            if not loses:
                assert after[row].equal(before[row])
                continue
            assert not after[row, expert].any()
            if kind != "home":  # whose gates add up to more than 1
                rest = before[row].clone()
                rest[expert] = 0
                torch.testing.assert_close(after[row], rest / rest.sum(0))
            else:
                assert after[row].isfinite().all() and (after[row].sum(0) > 0.99).all()
    assert gates().equal(before)


def test_slices_are_those_of_evaluate(run, page):
    from distmtl.evaluation import evaluate

    want = run_world(evaluate, 1, str(run), None, None, ("user",))[0]["validation"]["click"]["slices"]["user"]
    got = {row[1]: row for row in page.tables["by user"][1:] if row[0] == "click"}
    assert got.keys() == {"all", *want}
    for name, of in want.items():
        assert number(got[name][2]) == of["rows"]
        assert number(got[name][4]) == (None if of["auc"] is None else pytest.approx(of["auc"], rel=1e-5))
    assert "by domain" in page.tables


def test_a_sample_is_spread_and_has_as_many_rows_as_asked(run, tiny_data):
    from distmtl.data.dataset import open_dataset

    dataset = open_dataset(str(tiny_data / "train"))
    numbers = spread_rows(dataset, ["user"], 100)["__row__"].to_numpy()
    assert len(numbers) == 100 and np.all(np.diff(numbers) > 0) and numbers[0] < 100 and numbers[-1] > 2800
    assert spread_rows(dataset, ["user"], 10**6)["__row__"].to_pylist() == list(range(tiny.ROWS["train"]))
    assert run_world(examine_here, 1, str(run), 50)[0].rows == 50


def test_several_runs_are_laid_over_each_other(run, tiny_data, tmp_path):
    other = tmp_path / "shared"
    config = config_with_noise(tiny_data, other, train={"global_batch_size": 128, "log_every": 5, "steps": 10}, model={
        "kind": "shared_bottom", "bottom": [8],
    })  # fmt: skip
    train_world(config, 1)
    out = tmp_path / "both.html"
    assert main(["report", str(run), str(other), "--no-model", "--out", str(out)]) == 0
    page = Page(out.read_text())
    names = names_of([str(run), str(other)])
    assert page.tables["metrics by split and task"][0] == ["split", "task", "metric", *names]
    differences = {row[0]: row[1:] for row in page.tables["keys that differ"][1:]}
    assert differences["model.kind"] == ["mmoe", "shared_bottom"] and differences["model.num_experts"] == ["3", "–"]
    assert "data.train" not in differences and differences["train.steps"] == ["60", "10"]
    assert {f"click: {n}" for n in names} <= set(page.columns("losses"))
    assert "has no gates over experts" in page.sections["gates"] and "left out: the checkpoint was not asked" in page.sections["importance"]


def test_a_followed_run_is_one_learning_curve(tmp_path):
    for index in range(3):
        partitioned.write(tmp_path / "log", index)
    config = parse_config(partitioned.raw(tmp_path / "log", tmp_path / "run"))
    run_world(follow_here, 1, config, str(tmp_path / "log"))
    out = run_world(report, 1, [config.run_dir], None, 500, (), True, silent)[0]
    assert out == f"{config.run_dir}/report.html"
    page, lines = Page(Path(out).read_text()), partitioned.index_of(config)
    curve = page.columns("partitions")
    assert curve["partition"] == ["day=0", "day=1", "day=2"]
    want = [line["metrics"].get("click", {}).get("auc") for line in lines]
    assert [number(v) for v in curve["click: before training on it"]] == [None, *(pytest.approx(w, rel=1e-5) for w in want[1:])]
    assert page.columns("losses")["step"][-1] == str(sum(line["steps"] for line in lines)), "steps count through"
    assert "day=2" in Path(out).read_text().split("Examined: ")[1].split("</p>")[0], "by the checkpoint that has not seen it"


def follow_here(config, source):
    return follow(config, source, loop.train, Until(idle_s=0.0), report=lambda record: None)


def test_what_is_no_run_or_has_nothing_to_examine_is_said(run, tiny_data, tmp_path, capsys):
    with pytest.raises(DistmtlError, match="is no run: it has no metrics.jsonl"):
        read_run(str(tmp_path), "x")
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "x.html"), "--no-model"]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "x.html"), "--slices", "itme"]) == 1
    assert "did you mean 'item'" in capsys.readouterr().err
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    shutil.rmtree(alone / "checkpoints")
    assert main(["report", str(alone)]) == 0
    assert "no checkpoint was examined" in Page((alone / "report.html").read_text()).sections["calibration"]


def test_names_are_what_differs():
    assert names_of(["runs/a", "runs/b"]) == ["a", "b"]
    assert names_of(["runs/a/"]) == ["a"]
    assert names_of(["x/seed-0", "y/seed-0", "y/seed-0"]) == ["x/seed-0", "y/seed-0 (2)", "y/seed-0 (3)"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<script>
const boxes = [...document.querySelectorAll('main svg')].map(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim()).map(t => [t.textContent, t.getBoundingClientRect()]);
  const clash = [], box = svg.getBoundingClientRect();
  for (const [i, [a, p]] of texts.entries()) {
    if (p.left < box.left - 1 || p.right > box.right + 1 || p.top < box.top - 1 || p.bottom > box.bottom + 1) clash.push(a + ' is cut');
    for (const [b, q] of texts.slice(i + 1)) {
      const turned = /rotate\\((?!-?0\\b)/.test(svg.innerHTML) && p.height > 20 && q.height > 20;
      const x = Math.min(p.right, q.right) - Math.max(p.left, q.left), y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (!turned && x > 1 && y > 4) clash.push(a + ' on ' + b);
    }
  }
  return {label: svg.getAttribute('aria-label'), box: [box.left, box.top, box.right, box.bottom], clash};
});
const page = {boxes, wide: document.documentElement.scrollWidth, high: document.documentElement.scrollHeight,
  loaded: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name)};
document.body.innerHTML = ''; document.body.textContent = 'FOUND' + JSON.stringify(page) + 'END';
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_plot_whole(file, tmp_path, scheme):
    """At 1280 pixels: nothing wider, nothing loaded, no text on another or cut off, no plot without colour in it."""
    from PIL import Image

    def browser(page: Path, *options: str) -> str:
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        command = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        return subprocess.run([*command, *dark, *options, page.as_uri()], capture_output=True, text=True, timeout=200, check=True).stdout

    looked = tmp_path / "looked.html"
    looked.write_text(file.read_text().replace("</body>", LOOK + "</body>"))
    dom = browser(looked, "--window-size=1280,900", "--dump-dom")
    found = json.loads(re.search("FOUND(.*)END", dom, re.S)[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["wide"] <= 1280 and not found["loaded"]
    assert len(found["boxes"]) >= 12 and not [c for b in found["boxes"] for c in b["clash"]]

    picture = tmp_path / "page.png"
    browser(file, f"--window-size=1280,{found['high']}", f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert (pixels[0, 0].sum() > 600) == (scheme == "light")
    for b in found["boxes"]:
        left, top, right, bottom = map(int, b["box"])
        part = pixels[top:bottom, left:right]
        coloured = (part.max(2) - part.min(2) > 40).mean()
        assert coloured > 0.001, f"{b['label']} is blank"
        ink = (np.abs(part - pixels[0, 0]).max(2) > 150).mean()
        assert ink > 0.001, f"{b['label']} has no legible text"
