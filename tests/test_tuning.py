"""A search's space from its YAML: what is refused, the points it draws, their configs; and what its trials show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from distmtl.cluster.tuning import Asha
from distmtl.config.tuning import AshaConfig
from distmtl.config_file import load_config
from distmtl.errors import DistmtlError
from distmtl.tuning import Evaluation, Search, Trial, default_space, describe, extremes, former, load_tuning, make_base, make_trials, sample

ROOT = Path(__file__).parents[1]
SPACE = {
    "model": {
        "choice": [
            {"kind": "mmoe", "num_experts": {"int": [2, 5]}, "expert": {"choice": [[8], [16, 8]]}},
            {"kind": "shared_bottom", "bottom": [{"choice": [8, 16]}, 4]},
        ]
    },
    "weighting": {"choice": [{"kind": "static"}, {"kind": "uncertainty"}]},
    "optimizer.dense.lr": {"loguniform": [1e-4, 1e-1]},
    "optimizer.tables.lr": {"uniform": [0.01, 0.2]},
    "tasks.conversion.tower": {"choice": [[4], [8, 4]]},
    "features.user.dim": {"choice": [4, 12]},
}


def write(folder: Path, base: dict | None = None, **fields) -> Path:
    """A search over the tiny data, whose config is written beside it."""
    raw = tiny.raw(folder / "data", folder / "unused", data={"test": str(folder / "data" / "validation")}, **(base or {}))
    (folder / "base.yaml").write_text(yaml.safe_dump(raw))
    search = {"config": "base.yaml", "out": str(folder / "out"), "space": SPACE, "metric": "click.auc", "trials": 9, **fields}
    (folder / "search.yaml").write_text(yaml.safe_dump(search, sort_keys=False))
    return folder / "search.yaml"


def trials_of(folder: Path, base: dict | None = None, **fields) -> list[Trial]:
    return make_trials(make_base(load_tuning(write(folder, base, **fields))))


def test_points_are_those_of_the_seed_and_cover_the_space():
    points = sample(SPACE, 3, 64)
    assert points == sample(SPACE, 3, 64) and points[:5] == sample(SPACE, 3, 5), "the first do not depend on how many there are"
    assert points != sample(SPACE, 4, 64) and sample(SPACE, 3, 0) == []
    kinds = [p["model"]["kind"] for p in points]
    assert kinds.count("mmoe") == kinds.count("shared_bottom") == 32, "a Sobol sequence halves every dimension"
    assert {p["model"]["num_experts"] for p in points if p["model"]["kind"] == "mmoe"} == {2, 3, 4, 5}
    assert {tuple(p["model"]["bottom"]) for p in points if p["model"]["kind"] == "shared_bottom"} == {(8, 4), (16, 4)}
    lr = np.log10([p["optimizer.dense.lr"] for p in points])
    assert np.all((lr >= -4) & (lr <= -1)) and np.histogram(lr, 8, (-4, -1))[0].tolist() == pytest.approx([8] * 8, abs=1)
    assert all(0.01 <= p["optimizer.tables.lr"] <= 0.2 for p in points)


def test_a_small_space_gives_every_point_once():
    points = sample({"weighting": SPACE["weighting"], "features.user.dim": {"int": [4, 6]}}, 0, 20)
    assert len(points) == 6 and len({describe(p) for p in points}) == 6


def test_extremes_show_every_option():
    shown = list(extremes(SPACE))
    assert {p["model"].get("num_experts") for p in shown} == {2, 5, None}
    assert {tuple(p["model"].get("bottom", ())) for p in shown} == {(8, 4), (16, 4), ()}
    assert {p["optimizer.dense.lr"] for p in shown} == {1e-4, 1e-1} and {p["weighting"]["kind"] for p in shown} == {"static", "uncertainty"}
    assert len(shown) == 1 + 4 + 1 + 1 + 1 + 1 + 1, "a sum over the options, not a product"


def test_a_trial_is_the_config_with_a_point_laid_over_it(tmp_path):
    base = {"model": {"kind": "mmoe", "num_experts": 3, "expert": [16, 8], "dropout": 0.25}}
    first, *others = trials_of(tmp_path, base, overrides=["train.epochs=3"])
    alone = load_config(tmp_path / "base.yaml", ["train.epochs=3", "train.monitor=click.auc"])
    untouched = {"name", "run", "train", "data", "cluster"}
    assert first.point == {} and first.config.model_dump(exclude=untouched) == alone.model_dump(exclude=untouched)
    assert [t.number for t in others] == list(range(1, 9))
    for trial in others:
        config, point = trial.config, trial.point
        assert config.model.kind == point["model"]["kind"] and config.model.dropout == (0.25 if config.model.kind == "mmoe" else 0.0)
        assert config.optimizer.dense.lr == point["optimizer.dense.lr"] and config.weighting.kind == point["weighting"]["kind"]
        assert list(config.tasks[1].tower) == point["tasks.conversion.tower"] and config.tasks[0].tower == (8,)
        assert config.features[0].dim == point["features.user.dim"] and config.features[1].dim == 8
        assert config.data.test is None and config.train.keep == 1 and config.train.epochs == 3 and config.train.monitor == "click.auc"
        assert config.run_dir == str(tmp_path / "out" / "trials" / f"{trial.number:03d}") and config.run.seed == alone.run.seed


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"trial": 3}, "trial: unknown key; did you mean 'trials'?"),
        ({"trials": 0}, "trials: input should be greater than 0"),
        ({"scheduler": {"kind": "asha", "redution": 3}}, "scheduler.redution: unknown key; did you mean 'reduction'?"),
        ({"scheduler": {"reduction": 1}}, "scheduler.reduction: input should be greater than 1"),
        ({"space": {}}, "space: "),
        ({"space": {"modle": {"choice": [1]}}}, "space.modle: unknown section 'modle'; did you mean 'model'?"),
        ({"space": {"weighting": {"choice": []}}}, "space.weighting.choice: must be a list of one value or more, got []"),
        ({"space": {"model.dropout": {"choise": [0.1]}}}, "nothing varies in {'choise': [0.1]}; write {choice: […]}"),
        ({"space": {"model.num_experts": {"int": [4, 2.5]}}}, "num_experts.int: must be [low, high] with low < high, whole numbers"),
        ({"space": {"optimizer.dense.lr": {"loguniform": [0, 1]}}}, "space.optimizer.dense.lr.loguniform: low must be above 0, got 0"),
        ({"space": {"model": {"choice": [{"kind": "mmoe", "dropout": {"uniform": [0.5, 0.1]}}]}}}, "space.model.0.dropout.uniform: must"),
        ({"space": {"data.weight": {"choice": ["w", "x"]}}}, "space.data.weight cannot be tuned: trials are compared by it"),
        ({"space": {"tasks.click.label": {"choice": ["click"]}}}, "only tower, weight, focal, pos_weight are tuned"),
        ({"space": {"train.epochs": {"int": [1, 3]}}}, "of train only global_batch_size is tuned"),
        ({"space": {"run.seed": {"int": [1, 3]}}}, "the best of several seeds is luck"),
        ({"space": {"cluster.workers": {"int": [1, 3]}}}, "it says how a trial is run, not what it learns"),
        ({"space": {"model.num_expert": {"int": [2, 3]}}}, "model.num_expert: unknown key; did you mean 'num_experts'?, with model"),
        ({"space": {"tasks.clik.tower": {"choice": [[4]]}}}, "space.tasks.clik.tower: tasks has no element 'clik'; did you mean 'click'?"),
        ({"space": {"model.expert": {"choice": [[8], []]}}, "trials": 1}, "model.expert: must not be empty, with model.expert=[]"),
        ({"metric": "click.acu"}, "train.monitor 'click.acu': 'acu' is not one of"),
        ({"metric": "loss", "space": {"tasks.click.weight": {"uniform": [0.5, 2]}}}, "the loss has not the same terms in all trials"),
        ({"overrides": ["data.validation=null"]}, "data.validation is missing: trials are compared by it"),
        ({"overrides": ["train.eval_every=5"], "space": {"train.global_batch_size": {"choice": [64, 128]}}}, "other numbers of rows"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, fields, sentence):
    with pytest.raises(DistmtlError) as e:
        trials_of(tmp_path, **fields)
    assert sentence in str(e.value)


def test_the_folder_is_one_searchs(tmp_path):
    base = make_base(load_tuning(write(tmp_path)))
    assert former(base.tuning) == {}
    Search(base, make_trials(base), {}).write(tmp_path / "out")
    assert former(load_tuning(write(tmp_path, trials=12, parallel=1)))["trials"][3]["state"] == "waiting", "more trials may be asked for"
    for fields, what in (({"seed": 1}, "seed"), ({"overrides": ["train.epochs=2"], "metric": "auc"}, "metric, overrides")):
        with pytest.raises(DistmtlError, match=rf"is of another tune \({what}\); delete it, or choose another out"):
            former(load_tuning(write(tmp_path, **fields)))
    (tmp_path / "out" / "tune.json").unlink()
    with pytest.raises(DistmtlError, match="is not empty and no tune"):
        former(base.tuning)


def test_the_built_in_space_is_of_heads_where_the_config_leaves_a_choice(tmp_path):
    write(tmp_path)
    space = default_space(load_config(tmp_path / "base.yaml"))
    assert list(space) == ["model", "optimizer.dense.lr", "optimizer.tables.lr", "weighting"]
    assert len(trials_of(tmp_path, space=None, trials=30)) == 30
    funnel = default_space(load_config(ROOT / "configs" / "synthetic_esmm.yaml"))
    assert "model" not in funnel and "weighting" in funnel
    low, high = space["optimizer.dense.lr"]["loguniform"]
    assert low < 1e-3 < high


@pytest.fixture
def search(tmp_path) -> Search:
    """Trials: finished; the best that finished; stopped, although it was better then; failed; not begun."""
    base = make_base(load_tuning(write(tmp_path, trials=5)))
    trials = make_trials(base)
    figures = [("finished", [0.70, 0.71]), ("finished", [0.72, 0.73]), ("stopped", [0.74]), ("failed", [0.6]), ("waiting", [])]
    for trial, (state, values) in zip(trials, figures, strict=True):
        trial.state, trial.evaluations, trial.why = state, [Evaluation(i, 10 * (i + 1), 20, v) for i, v in enumerate(values)], "it rains"
    return Search(base, trials, {1: {"click": {"auc": 0.69, "rows": 7}, "rating": {"rmse": 0.5}}}, ["seeds: 0"])


def test_every_form_says_the_same(search, tmp_path):
    search.write(tmp_path / "out")
    text, markdown = search.text(), (tmp_path / "out" / "tune.md").read_text()
    for form in (text, markdown):
        assert "best by validation click.auc: trial 1, 0.73000 (trial 0, the config as it was: 0.71000)" in form
        assert "stopped by asha at step 10 of 20" in form and "failed: it rains" in form and "not begun" in form and "seeds: 0" in form
        assert "test, looked at after the choice: click AUC 0.6900, rating RMSE 0.5" in form
    assert [line.split()[0] for line in text.splitlines()[1:6]] == ["2", "1*", "0", "3", "4"] and "| 1* |" in markdown
    written = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert written["best"] == 1 and written["trials"][2] == {
        "trial": 2, "point": search.trials[2].point, "state": "stopped", "ended": "stopped by asha at step 10 of 20", "validation": 0.74,
        "evaluations": 1, "steps": 10, "seconds": 0.0,
    }  # fmt: skip


def test_best_yaml_is_the_trials_config_wherever_it_lies(search, tmp_path):
    search.write(tmp_path / "out")
    best, trial = load_config(tmp_path / "out" / "best.yaml"), search.trials[1].config
    assert (best.name, best.run.dir, best.data.test) == ("search_best", None, str(tmp_path / "data" / "validation"))
    apart = {"name": True, "run": {"dir"}, "data": {"test"}, "train": {"keep"}}
    assert best.model_dump(exclude=apart) == trial.model_dump(exclude=apart)
    assert "# best by validation click.auc: trial 1, 0.73000" in (tmp_path / "out" / "best.yaml").read_text()


def test_asha_goes_on_where_it_was(tmp_path):
    """With the logs of a search that was cut off, it stops what it would have stopped, and judges new trials by the old ones."""
    trials = trials_of(tmp_path, trials=5)

    def seen(trial: int, *values: float, first: float) -> None:
        trials[trial].evaluations = [Evaluation(first + i, 10 * (i + 1), 90, v) for i, v in enumerate(values)]

    seen(0, 0.70, 0.71, 0.72, first=0)
    seen(1, 0.60, first=0.5)  # at the first rung after trial 0, and not in the upper half: Ray Tune was cut off before it could say so
    seen(2, 0.75, 0.76, first=2.5)
    asha = Asha(AshaConfig(reduction=2, grace=1), trials)
    assert [t.state for t in trials] == ["waiting", "stopped", "waiting", "waiting", "waiting"]

    class Known:
        def __init__(self, number: int):
            self.trial_id, self.config = f"another id {number}", {"trial": {"number": number}}

    def told(number: int, evaluations: int, best: float) -> str:
        asha.on_trial_add(None, Known(number))
        return asha.on_trial_result(None, Known(number), {"evaluations": evaluations, "best": best})

    assert told(0, 3, 0.72) == told(0, 2, 0.0) == "CONTINUE", "what was decided is not decided again"
    assert told(3, 1, 0.69) == "STOP" and told(4, 1, 0.71) == "CONTINUE", "the median of .70, .60, .75 and .69 lies between"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "tuning").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_searches_are_sound(path, tmp_path):
    """With a config in place of a prepared data set's."""
    tuning = load_tuning(path)
    if not Path(tuning.config).is_relative_to(ROOT / "configs"):
        base = yaml.safe_load((ROOT / "configs" / "synthetic.yaml").read_text())
        base["tasks"] = [{"kind": "binary", "name": t} for t in ("income", "never_married")]
        (tmp_path / "prepared.yaml").write_text(yaml.safe_dump(base))
        tuning = tuning.model_copy(update={"config": str(tmp_path / "prepared.yaml")})
    assert len(make_trials(make_base(tuning))) == tuning.trials
