"""What a config may hold, and the sentence that a mistake in it gives."""

from pathlib import Path
from typing import get_args

import pytest
import tiny
import yaml
from pydantic import ValidationError

from distmtl.config import BinaryTask, WeightingConfig
from distmtl.config_file import dump_config, load_config, parse_config
from distmtl.errors import DistmtlError


def raw():
    return tiny.raw(Path("/data"), Path("/runs/tiny"))


def write(folder, config, name="tiny.yaml"):
    path = folder / name
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def put(config, place, value):
    """Set a dotted place; numbers index lists."""
    node, (*parents, leaf) = config, [int(p) if p.isdigit() else p for p in place.split(".")]
    for p in parents:
        node = node[p] if isinstance(node, list) else node.setdefault(p, {})
    node[leaf] = value
    return config


def mistakes(config):
    """The lines of the refusal, without their heading."""
    with pytest.raises(DistmtlError) as e:
        parse_config(config)
    heading, *lines = str(e.value).split("\n  - ")
    assert heading == f"config: {len(lines)} mistake{'s' * (len(lines) > 1)}"
    return lines


ONE = {  # place, value → the only mistake
    # keys
    "top level": ("modle", {}, "modle: unknown key; did you mean 'model'?"),
    "nested": ("train.epoch", 3, "train.epoch: unknown key; did you mean 'epochs'?"),
    "deeper": ("optimizer.schedule.warmup", 3, "optimizer.schedule.warmup: unknown key; did you mean 'warmup_steps'?"),
    "of a kind": ("model.num_expert", 3, "model.num_expert: unknown key; did you mean 'num_experts'?"),
    "in a list": ("features.1.dmi", 4, "features.item.dmi: unknown key; did you mean 'dim'?"),
    "of other kinds": ("model.dropot", 0.5, "model.dropot: unknown key; did you mean 'dropout'?"),
    "of other kinds' keys": (
        "model.shared_experts", 1, "model.shared_experts: unknown key for this kind; it belongs to cgc and ple and stem",
    ),
    "in another kind": (
        "optimizer.tables", {"kind": "sgd", "momentm": 0.9}, "optimizer.tables.momentm: unknown key; known here: kind, lr",
    ),
    "in an optional": ("train.early_stopping", {"patence": 2}, "train.early_stopping.patence: unknown key; did you mean 'patience'?"),
    "in a table": ("tables", {"item": {"shardin": []}}, "tables.item.shardin: unknown key; did you mean 'sharding'?"),
    "in a table's optimizer": (
        "tables", {"item": {"optimizer": {"kind": "adam", "beta": []}}}, "tables.item.optimizer.beta: unknown key; did you mean 'betas'?",
    ),
    "of a section": ("global_batch_size", 64, "global_batch_size: unknown key; did you mean 'train.global_batch_size'?"),
    "of a section, not top": ("train.seed", 64, "train.seed: unknown key; did you mean 'run.seed'?"),
    "a table named like a kind": ("tables", {"sgd": {"optimiser": {}}}, "tables.sgd.optimiser: unknown key; did you mean 'optimizer'?"),
    "not text": (12, 3, "12: keys should be strings, got 12"),
    # kinds
    "unknown kind": (
        "model.kind", "mmeo", "model: kind 'mmeo' is not one of single_task, shared_bottom, omoe, mmoe, cgc, ple, esmm, escm2, aitm, "
        "dbmtl, stem, home, star, pepnet, plugin; did you mean 'mmoe'?",
    ),
    "unknown kind in a list": (
        "tasks.0.kind", "ranking",
        "tasks.click: kind 'ranking' is not one of "
        "binary, regression, ordinal, multiclass, watch_time, quantile, zero_inflated_lognormal",
    ),
    "no kind": ("features.4", {"name": "a", "rows": 3}, "features.a: kind is missing; it is one of id, sequence, bucket, numeric, vector"),
    "no kind deeper": ("optimizer.dense", {"lr": 0.1}, "optimizer.dense: kind is missing; it is one of adamw, adam, adagrad, sgd"),
    "weighting": (
        "weighting", {"kind": "pcgard"},
        "weighting: kind 'pcgard' is not one of static, uncertainty, dwa, rlw, imtl_l, famo, bandit, gradnorm, pcgrad, mgda, imtl_g, "
        "cagrad, nash, aligned, db_mtl; did you mean 'pcgrad'?",
    ),
    "weighting of another kind": (
        "weighting", {"kind": "imtl_l", "window": 5}, "weighting.window: unknown key for this kind; it belongs to dwa",
    ),
    "a boost that is none": ("weighting", {"kind": "bandit", "boost": 1.0}, "weighting.boost: input should be greater than 1, got 1.0"),
    # values
    "missing": ("features.0", {"kind": "id", "name": "user"}, "features.user.rows: missing; it must be given"),
    "text for a number": (
        "train.epochs", "two", "train.epochs: input should be a valid integer, unable to parse string as an integer, got 'two'",
    ),
    "half a number": ("train.epochs", 1.5, "train.epochs: input should be a valid integer, got a number with a fractional part, got 1.5"),
    "too small": ("train.epochs", 0, "train.epochs: input should be greater than 0, got 0"),
    "too large": ("model.dropout", 1.0, "model.dropout: input should be less than 1, got 1.0"),
    "NaN": ("optimizer.clip_norm", float("nan"), "optimizer.clip_norm: input should be a finite number, got nan"),
    "inf": ("features.5.mean", float("inf"), "features.x.mean: input should be a finite number, got inf"),
    "inf in a list": (
        "features.4.boundaries", [0, float("inf")],
        "features.x_bucket.boundaries.1: input should be a finite number, got inf",
    ),
    "of a choice": ("cluster.device", "gpu", "cluster.device: input should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    "a name with a space": ("name", "my run", "name: must be letters, digits, _ and -, and not start with a digit or -, got 'my run'"),
    "yes": (
        "name", True, "name: input should be a valid string, got True; YAML takes yes, no, on and off for truth values: quote it",
    ),
    "an empty section": ("train", None, "train: must be a mapping (key: value), got None"),
    "a list for a section": ("train", [1], "train: must be a mapping (key: value), got [1]"),
    "a mapping for a list": ("features", {"a": 1}, "features: must be a list, got {'a': 1}"),
    "a number for a feature": ("features.0", 7, "features.0: must be a mapping (key: value), got 7"),
    "no features": ("features", [], "features: must not be empty"),
    "no tasks": ("tasks", [], "tasks: must not be empty"),
    "no widths": ("model.expert", [], "model.expert: must not be empty"),
    "plug-in": ("model", {"kind": "plugin", "target": "mine.Head"}, "model.target: must be package.module:Name, got 'mine.Head'"),
    "dim": ("features.1.dim", 6, "feature 'item': dim 6 is not a multiple of 4, which FBGEMM needs"),
    "boundaries": ("features.4.boundaries", [0, 0], "feature 'x_bucket': boundaries must increase"),
    # what must agree
    "table of two widths": (
        "features.1", {"kind": "id", "name": "item", "rows": 200, "dim": 16, "table": "user"},
        "table 'user': feature 'item' wants 200 rows x 16 columns, feature 'user' wants 200 x 8; "
        "give both the same size or different tables",
    ),
    "unknown table": ("tables", {"itm": {}}, "tables.itm: no feature reads a table of this name; did you mean 'item'?"),
    "feature twice": ("features.1.name", "user", "feature 'user' is listed 2 times; names must differ"),
    "task twice": ("tasks.1", {"kind": "binary", "name": "click", "label": "like"}, "task 'click' is listed 2 times; names must differ"),
    "leak": ("features.5.column", "rating", "feature 'x' reads column 'rating', the label of task 'rating'"),
    "PLE without experts": (
        "model", {"kind": "ple", "shared_experts": 0, "task_experts": 0},
        "model: a PLE needs experts: set shared_experts or task_experts above 0",
    ),
    "PLE with a dead shared gate": (
        "model", {"kind": "ple", "shared_experts": 0},
        "model: a PLE of several levels needs shared_experts above 0: its shared gate has nothing to pass on",
    ),
    "CGC without experts": (
        "model", {"kind": "cgc", "shared_experts": 0, "task_experts": 0},
        "model: a CGC needs experts: set shared_experts or task_experts above 0",
    ),
    "monitor of no task": ("train.monitor", "clik.auc", "train.monitor 'clik.auc': no task 'clik'; did you mean 'click'?"),
    "monitor of no metric": (
        "train.monitor", "click.acc",
        "train.monitor 'click.acc': 'acc' is not one of loss, auc, gauc, pr_auc, logloss, ne, "
        "joint_auc, joint_gauc, joint_pr_auc, joint_logloss, joint_ne, entire_auc, rmse, mae, accuracy, positive_auc",
    ),
    "monitor of another kind": ("train.monitor", "rating.auc", "train.monitor 'rating.auc': no task it covers has that metric"),
    "a joint metric of a task that is not joint": (
        "train.monitor", "click.joint_auc",
        "train.monitor 'click.joint_auc': joint_ metrics are of tasks of space entire, and no task it covers is one",
    ),
    "a metric of an unknown truth": (
        "train.monitor", "conversion.entire_auc",
        "train.monitor 'conversion.entire_auc': no task it covers has a true_probability_entire, which entire_auc needs",
    ),
    "groups without a column": ("data.group", None, "train.monitor 'gauc': gauc needs data.group, the column of the groups"),
    "a parent twice": (
        "tasks.1.parents", ["click", "click"], "task 'conversion': parent 'click' is listed 2 times; once is enough",
    ),
    "SNIPS of DR": (
        "model", {"kind": "escm2", "method": "dr", "self_normalised": True},
        "model: self_normalised is of method ipw alone; leave it out, or choose ipw",
    ),
    "thinned and delayed": (
        "tasks.0", {"kind": "binary", "name": "click", "kept_negatives": 0.1, "delay": {"kind": "fnw"}},
        "task 'click': with delay no constant undoes kept_negatives, since negatives may yet turn; leave one out",
    ),
    "nothing to watch": ("data.validation", None, "train.early_stopping needs data.validation: there is nothing to watch"),
    "workers": (
        "cluster.workers", 9, "cluster.workers 9 exceeds data.num_streams 8: a worker owns at least one stream; raise num_streams",
    ),
    "no workers": ("cluster.workers", 0, "cluster.workers: must be a number of at least 1, or {min: …, max: …}, got 0"),
    "workers turned round": ("cluster.workers", {"min": 3, "max": 2}, "cluster.workers: min 3 exceeds max 2"),
    "too many at most": (
        "cluster.workers", {"min": 1, "max": 9},
        "cluster.workers 9 exceeds data.num_streams 8: a worker owns at least one stream; raise num_streams",
    ),
    "batch": ("train.global_batch_size", 100, "train.global_batch_size 100 is not divisible by data.num_streams 8; try 96"),
    "small batch": ("train.global_batch_size", 5, "train.global_batch_size 5 is not divisible by data.num_streams 8; try 8"),
    "a cache of a table on the device": (
        "tables", {"item": {"cache": 0.2}},
        "tables.item: cache is of memory cached alone, and memory is device; set memory: cached, or leave cache out",
    ),
    "a cache of a table in host memory": (
        "tables", {"item": {"memory": "host", "cache": 0.1}},
        "tables.item: cache is of memory cached alone, and memory is host; set memory: cached, or leave cache out",
    ),
    "column split": (
        "tables", {"item": {"sharding": ["column_wise"]}},
        "table 'item': column_wise cannot train with rowwise_adagrad, whose one momentum per row would differ in every column shard; "
        "choose adagrad or sgd, or another sharding type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE)
def test_one_mistake_one_sentence(case):
    place, value, sentence = ONE[case]
    config = raw()
    if case == "nothing to watch":
        config["train"]["early_stopping"] = {}
    if case == "groups without a column":
        config["train"]["monitor"] = "gauc"
    config = config | {place: value} if isinstance(place, int) else put(config, place, value)
    assert mistakes(config) == [sentence]


def test_star_needs_more_than_its_domain():
    config = raw() | {"model": {"kind": "star", "domain": "user"}, "features": [{"kind": "id", "name": "user", "rows": 3}]}
    assert mistakes(config) == ["model star: its main network leaves the domain 'user' out, and there is no other feature; add some"]


WEIGHTINGS = get_args(get_args(WeightingConfig)[0])
BALANCED = [kind for c in WEIGHTINGS for kind in get_args(c.model_fields["kind"].annotation) if kind != "static"]
PARTED = {
    "single_task": {},
    "aitm": {},
    "pepnet": {"domain_features": ["user"], "gate_features": ["item"]},
    "plugin": {"target": "mine:Network"},
}


@pytest.mark.parametrize("kind", BALANCED)
def test_weighting_needs_two_tasks(kind):
    sentence = f"weighting {kind} balances tasks, and only one has a weight above 0; add a task, or leave weighting out"
    config = put(raw(), "weighting", {"kind": kind})
    for tasks in (config["tasks"][:1], [config["tasks"][0], *({**t, "weight": 0} for t in config["tasks"][1:])]):
        assert mistakes(config | {"tasks": tasks}) == [sentence]


@pytest.mark.parametrize("kind", PARTED)
def test_gradients_are_compared_only_where_something_is_shared(kind):
    config = put(raw(), "model", {"kind": kind} | PARTED[kind])
    if kind == "aitm":
        config["tasks"][1] |= {"parents": ["click"]}
    refused = [
        f"weighting pcgrad compares the tasks' gradients in the network that they share, and {kind} has none; "
        "choose another model, or weighting.cut: features, which balances the embeddings that they share"
    ]
    weighting = lambda cut: put(config, "weighting", {"kind": "pcgrad", "cut": cut})  # noqa: E731
    assert mistakes(weighting("network")) == refused
    assert parse_config(weighting("features"))
    if kind == "single_task":  # it shares no layer: whoever wants the embeddings balanced says so
        assert mistakes(weighting("auto")) == refused
    else:
        assert parse_config(weighting("auto"))


def test_column_splits_of_all_tables_are_refused_for_each():
    lines = mistakes(put(raw(), "sharding.types", ["column_wise", "grid_shard"]))
    assert [line.split(":")[0] for line in lines] == [f"table {t!r}" for t in ("user", "item", "tags", "city", "x_bucket")]
    parse_config(put(put(raw(), "sharding.types", ["column_wise"]), "optimizer.tables", {"kind": "adagrad"}))


def test_the_size_that_is_suggested_works():
    for batch in (1, 5, 100, 1001):
        (line,) = mistakes(put(raw(), "train.global_batch_size", batch))
        suggested = int(line.rsplit(" ", 1)[1])
        assert parse_config(put(raw(), "train.global_batch_size", suggested)).train.global_batch_size == suggested


@pytest.mark.parametrize(
    ("sections", "refusal"),
    [
        (
            {"weighting": {"kind": "db_mtl"}, "tasks.2": {"kind": "zero_inflated_lognormal", "name": "rating"}},
            "task 'rating': its loss, a density's, may fall below 0, where weighting db_mtl means nothing; choose rlw, bandit, or a "
            "weighting of gradients such as pcgrad",
        ),
        (
            {"weighting": {"kind": "nash"}, "model": {"kind": "single_task"}},
            "weighting nash compares the tasks' gradients in the network that they share, and single_task has none; choose another model, "
            "or weighting.cut: features, which balances the embeddings that they share",
        ),
        (
            {"weighting": {"kind": "aligned", "cut": "features"}, "features": [{"kind": "numeric", "name": "x"}]},
            "weighting aligned compares the tasks' gradients at the embeddings, and no feature has any; leave weighting out",
        ),
    ],
)
def test_gradients_that_cannot_be_weighed(sections, refusal):
    config = raw()
    for place, value in sections.items():
        put(config, place, value)
    assert mistakes(config) == [refusal]


def test_all_mistakes_at_once():
    config = raw()
    for place, value in {
        "modle": 1, "train.epoch": 1, "train.log_every": 0, "model.kind": "x", "features.0.dim": 3, "features.2": {"name": "tags"},
        "tasks.0.weight": -1, "data.train": None,
    }.items():  # fmt: skip
        put(config, place, value)
    lines = mistakes(config)
    assert len(lines) == 8
    for start in (
        "modle",
        "train.epoch",
        "train.log_every",
        "model",
        "feature 'user'",
        "features.tags",
        "tasks.click.weight",
        "data.train",
    ):
        assert sum(line.startswith(f"{start}: ") for line in lines) == 1, (start, lines)


def test_disagreements_at_once():
    config = put(put(put(raw(), "train.global_batch_size", 100), "cluster.workers", 99), "tables", {"a": {}, "b": {}})
    assert len(mistakes(put(config, "train.monitor", "acc"))) == 5


def test_missing_sections():
    assert mistakes({"name": "a"}) == [f"{key}: missing; it must be given" for key in ("data", "features", "tasks")]


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides(tmp_path):
    path = write(tmp_path, raw())
    config = load_config(
        path,
        ["train.epochs=7", "features.item.dim=16", "features.0.dim=12", "tasks.rating.weight=0", "model={kind: ple, num_levels: 3}",
         "tables.item.sharding=[table_wise]", "train.early_stopping.patience=4", "data.group=null", "optimizer.dense={kind: sgd, lr: 2e-3}",
         "optimizer.dense.lr=1e-3", "data.validation=s3://bucket/a=b.parquet", "model.num_levels=2"],
    )  # fmt: skip
    assert (config.train.epochs, config.train.early_stopping.patience, config.data.group) == (7, 4, None)
    assert {f.name: f.dim for f in config.embedded} == {"user": 12, "item": 16, "tags": 8, "city": 8, "x_bucket": 4}
    assert [t.weight for t in config.tasks] == [1, 1, 0]
    assert (config.model.kind, config.model.num_levels) == ("ple", 2)
    assert config.tables["item"].sharding == ("table_wise",)
    assert config.optimizer.dense.lr == 1e-3  # PyYAML alone reads text
    assert config.data.validation == "s3://bucket/a=b.parquet"


def test_an_override_below_an_empty_section(tmp_path):
    path = write(tmp_path, put(put(raw(), "train.early_stopping", None), "optimizer", None))
    config = load_config(path, ["train.early_stopping.patience=3", "optimizer.clip_norm=1"])
    assert config.train.early_stopping.patience == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", "override 'train.epochs' is not section.key=value"),
        ("=3", "override '=3' is not section.key=value"),
        ("train..epochs=3", "override 'train..epochs=3' is not section.key=value"),
        ("train.epoch=3", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("trian.epochs=3", "trian: unknown key; did you mean 'train'?"),
        ("name.first=3", "override 'name.first=3': name is a plain value and has no fields"),
        ("train.global_batch_size.x.y=3", "train.global_batch_size is a plain value"),
        ("features.itm.dim=8", "override 'features.itm.dim=8': features has no element 'itm'; did you mean 'item'?"),
        ("features.7.dim=8", "features has no element '7'"),
        ("features.-1.dim=8", "features has no element '-1'"),
        ("features.²=8", "features has no element '²'"),
        ("train.epochs=[1", "override 'train.epochs=[1': the value is not valid YAML: line 1, column 3"),
        ("model={kind: ple, kind: cgc}", "key 'kind' is given twice"),
        ("model.kind=ple", "model.num_experts: unknown key for this kind; it belongs to omoe and mmoe"),
    ],
)
def test_bad_overrides(tmp_path, override, words):
    with pytest.raises(DistmtlError) as e:
        load_config(write(tmp_path, raw()), [override])
    assert words in str(e.value)


# ----------------------------------------------------------------------------------------------------------------- file


def test_dump_reads_back_the_same(tmp_path):
    config = parse_config(
        put(put(raw(), "optimizer.tables", {"kind": "adam", "eps": 1e-30}), "model", {"kind": "plugin", "target": "a:B", "args": {
            "lr": "1e-3", "on": "off", "n": 1e16, "x": [1, None, {"y": "1.5", "ü": "ß"}]}})
    )  # fmt: skip
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert dump_config(again) == dump_config(config)
    assert parse_config(config.model_dump(mode="json")) == config  # what goes to workers and into checkpoints
    plain = parse_config(raw())
    assert load_config(write(tmp_path, dump_config(plain))) == plain
    elastic = load_config(write(tmp_path, dump_config(plain)), ["cluster.workers={min: 2, max: 4}"])
    assert (elastic.cluster.workers.min, elastic.cluster.workers.max) == (2, 4)
    assert load_config(write(tmp_path, dump_config(elastic))) == elastic


def test_frozen():
    config = parse_config(raw())
    for section, key in ((config, "name"), (config.train, "epochs"), (config.features[0], "rows")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)


def test_data_paths_are_relative_to_the_file_and_name_is_its_stem(tmp_path, monkeypatch):
    config = raw()
    del config["name"], config["run"]
    config["data"] |= {"train": "logs/train", "validation": "../day=*/*.parquet", "test": "s3://bucket/test"}
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", config, "2024.my run.yaml")
    monkeypatch.chdir(tmp_path)
    loaded = load_config("sub/2024.my run.yaml")
    assert loaded == load_config(path)
    assert loaded.data.train == str(tmp_path / "sub/logs/train")
    assert loaded.data.validation == str(tmp_path / "day=*/*.parquet")
    assert loaded.data.test == "s3://bucket/test"
    assert (loaded.name, loaded.run_dir) == ("_2024-my-run", "runs/_2024-my-run")
    assert load_config(path, ["data.train=~/logs"]).data.train == str(Path("~/logs").expanduser())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; it must hold a mapping"),
        ("# nothing\n", "is empty; it must hold a mapping"),
        ("- a\n- b\n", "holds a list, but must hold a mapping (name: …, data: …)"),
        ("train", "holds a str, but must hold a mapping"),
        ("name: [1, 2\ndata: {}", "is not valid YAML: line 2, column 5: "),
        ("name: a\n\tdata: b", "is not valid YAML: line 2, column 1: "),
        ("name: a\ntrain:\n  epochs: 2\n  log_every: 3\n  epochs: 4\n", "is not valid YAML: line 5, column 3: key 'epochs' is given twice"),
        ("name: a\nname: b\n", "line 2, column 1: key 'name' is given twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor for the tag"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(DistmtlError) as e:
        load_config(path)
    assert str(e.value).startswith(f"config {path} ") and words in str(e.value)
    assert "\n" not in str(e.value)


def test_no_file_a_folder_a_binary_file(tmp_path):
    binary, latin = tmp_path / "binary.yaml", tmp_path / "latin.yaml"
    binary.write_bytes(b"PAR1\x00\x01\x02")
    latin.write_bytes("name: größe".encode("latin-1"))
    for path, words in (
        (tmp_path / "absent.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "not valid YAML"),
        (latin, "not valid YAML"),
    ):
        with pytest.raises(DistmtlError, match=words) as e:
            load_config(path)
        assert str(path) in str(e.value)


def test_numbers_and_merges_of_yaml(tmp_path):
    text = dump_config(parse_config(raw()))
    head = "defaults: &wide {dim: 8, kind: id}\n"
    assert "lr: 0.05" in text
    config = load_config(write(tmp_path, text.replace("lr: 0.05", "lr: 5e-3").replace("epochs: 1", "epochs: 1e1")))
    assert (config.optimizer.tables.lr, config.train.epochs) == (5e-3, 10)
    plugin = {"kind": "plugin", "target": "a:B", "args": {"lr": 1}}
    text = yaml.safe_dump(put(raw(), "model", plugin)).replace("lr: 1", "lr: 1e-3\n    version: 1.e.3")
    assert load_config(write(tmp_path, text)).model.args == {"lr": 1e-3, "version": "1.e.3"}

    merged = raw()
    merged["features"] = []
    text = head + yaml.safe_dump(merged).replace("features: []", "features:\n- {<<: *wide, name: user, rows: 9, dim: 4}")
    with pytest.raises(DistmtlError, match="1 mistake\n  - defaults: unknown key"):
        load_config(write(tmp_path, text))
    text = yaml.safe_dump(merged).replace(
        "features: []", "features:\n- &first {kind: id, name: user, rows: 9, dim: 8}\n- {<<: *first, name: item, dim: 4}"
    )
    assert [(f.name, f.rows, f.dim) for f in load_config(write(tmp_path, text)).embedded] == [("user", 9, 8), ("item", 9, 4)]


def test_defaults_of_names():
    config = parse_config(raw())
    assert isinstance(config.tasks[0], BinaryTask) and [t.column for t in config.tasks] == ["click", "conversion", "rating"]
    assert [(f.source, f.table_name) for f in config.embedded][-1] == ("x", "x_bucket")


@pytest.mark.parametrize(("given", "low", "high"), [("3", 3, 3), ("2-4", 2, 4)])
def test_workers_on_the_command_line(tmp_path, given, low, high):
    from distmtl.__main__ import parse

    workers = parse(["train", "c.yaml", "--workers", given]).workers
    config = load_config(write(tmp_path, raw()), [f"cluster.workers={workers}"])
    assert (config.cluster.workers.min, config.cluster.workers.max) == (low, high)
    with pytest.raises(SystemExit):
        parse(["train", "c.yaml", "--workers", "2-3-4"])
