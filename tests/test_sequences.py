"""Sequences: every pooling against loops in float64, and lists that are too long."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from torchrec import JaggedTensor

from distmtl.config_file import parse_config
from distmtl.data.check import check_dataset
from distmtl.data.collate import ROW, Collator
from distmtl.data.dataset import open_dataset
from distmtl.distributed.planner import constraints
from distmtl.distributed.sharding import table_parameters
from distmtl.errors import DistmtlError
from distmtl.model.kernels import segment_sum, spread
from distmtl.model.layout import Layout
from distmtl.model.multitask import initialise_dense
from distmtl.model.sequences import Attention, SequencePooling, TargetAttention
from distmtl.planning.world import dense_parameters, offline_model

LENGTHS = torch.tensor([0, 3, 1, 0, 4, 0])
DIM, COPIES = 4, 2


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def lists(x):
    """The ids of every row, as a loop finds them."""
    ends = LENGTHS.cumsum(0).tolist()
    return [x[end - n : end] for end, n in zip(ends, LENGTHS.tolist(), strict=True)]


def unit(kind, *arguments):
    built = kind(DIM, *arguments).double()
    initialise_dense(built, seed=1)
    return built


def attended(x, unit):
    w, q, out = unit.hidden.weight, unit.query.weight[0], torch.zeros(len(LENGTHS), COPIES, DIM, dtype=torch.float64)
    for b, ids in enumerate(lists(x)):
        for c in range(COPIES):
            scores = [sum(q[i] * torch.tanh(sum(w[i, j] * e[c, j] for j in range(DIM))) for i in range(DIM)) for e in ids]
            total = sum(s.exp() for s in scores)
            for s, e in zip(scores, ids, strict=True):
                out[b, c] = out[b, c] + s.exp() / total * e[c]
    return out


def compared(x, targets, unit):
    out = torch.zeros(len(LENGTHS), COPIES, DIM, dtype=torch.float64)
    for b, ids in enumerate(lists(x)):
        for c in range(COPIES):
            t = targets[b, c]
            for e in (e[c] for e in ids):
                a = unit.layers[0](torch.cat([e, t, e - t, e * t]))
                for slope, layer in zip(unit.activations, unit.layers[1:], strict=True):
                    a = layer(torch.where(a > 0, a, slope.weight * a))
                out[b, c] = out[b, c] + a * e
    return out


def assert_same(got, expected, inputs):
    torch.testing.assert_close(got, expected)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_attention_is_a_softmax_over_the_ids_of_a_row():
    x, attention = drawn(int(LENGTHS.sum()), COPIES, DIM), unit(Attention)
    out = attention(x, LENGTHS)
    assert_same(out, attended(x, attention), [x, *attention.parameters()])
    assert (out[LENGTHS == 0] == 0).all()
    torch.testing.assert_close(out[2], x[3])  # of one id alone


def test_attention_to_scores_beyond_what_exp_can_hold():
    attention = unit(Attention)
    with torch.no_grad():
        attention.query.weight.mul_(1e4)
    out = attention(drawn(int(LENGTHS.sum()), COPIES, DIM), LENGTHS)
    assert out.isfinite().all() and out[1].abs().sum() > 0


@pytest.mark.parametrize("widths", [(), (5,), (6, 3)])
def test_target_attention_is_dins_activation_unit(widths):
    x, targets, din = drawn(int(LENGTHS.sum()), COPIES, DIM), drawn(len(LENGTHS), COPIES, DIM), unit(TargetAttention, widths)
    out = din(x, LENGTHS, targets)
    assert_same(out, compared(x, targets, din), [x, targets, *din.parameters()])
    assert (out[LENGTHS == 0] == 0).all()


def test_no_ids_at_all():
    none, x = torch.zeros(3, dtype=torch.int64), torch.zeros(0, COPIES, DIM, requires_grad=True)
    for out in (unit(Attention).float()(x, none), unit(TargetAttention, (5,)).float()(x, none, torch.ones(3, COPIES, DIM))):
        assert out.shape == (3, COPIES, DIM) and (out == 0).all()
        out.sum().backward()


def test_segments():
    x, rows = drawn(int(LENGTHS.sum()), 3), drawn(len(LENGTHS), 2)
    expected = torch.stack([ids.sum(0) for ids in lists(x)])
    torch.testing.assert_close(segment_sum(x, LENGTHS.int()), expected)
    assert torch.equal(spread(rows, LENGTHS, len(x)), rows[[1, 1, 1, 2, 4, 4, 4, 4]])
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, LENGTHS), x)
    assert torch.autograd.gradcheck(lambda r: spread(r, LENGTHS, len(x)), rows)


HISTORY = {"kind": "sequence", "name": "history", "column": "tags", "rows": 50, "table": "item", "dim": 8, "max_length": 3}


def raw(**changes):
    config = tiny.raw(Path("/data"), Path("/runs/tiny"))
    config["features"].insert(1, {**HISTORY, **changes})
    return config


def test_pooling_takes_each_feature_from_its_collection_and_leaves_mean_to_the_feature_vector():
    config = parse_config(raw(pooling="target", target="item"))
    assert config.sequence_tables == {"item"} and Layout.of(config).places["history"] == (8, 16)
    pooling = SequencePooling(config)
    x, t = drawn(int(LENGTHS.sum()), 8).float(), drawn(len(LENGTHS), 8).float()
    out = pooling([{"history": JaggedTensor(x, lengths=LENGTHS), "item": JaggedTensor(t, lengths=torch.ones_like(LENGTHS))}])
    assert torch.equal(out["item"], t)
    expected = pooling.units["history_pooling"](x[:, None], LENGTHS, t[:, None])[:, 0]
    assert torch.equal(out["history"], expected)
    mean = SequencePooling(parse_config(raw(pooling="mean")))([{"history": JaggedTensor(x, lengths=LENGTHS)}])["history"]
    torch.testing.assert_close(mean, torch.stack([ids.sum(0) for ids in lists(x)]))
    assert math.isclose(sum(p.numel() for p in pooling.parameters()), 32 * 32 + 32 + 1 + 32 + 1)


MISTAKES = {
    "no target": ({"pooling": "target"}, "pooling target compares with a feature, the candidate item say; name it in target"),
    "a target for nothing": ({"target": "item"}, "target 'item' is of pooling target alone, not of mean"),
    "unknown target": (
        {"pooling": "target", "target": "itme"}, "feature 'history': target 'itme' is no id feature; did you mean 'item'?",
    ),
    "a target that is no id": ({"pooling": "target", "target": "x_bucket"}, "feature 'history': target 'x_bucket' is no id feature"),
    "itself": ({"pooling": "target", "target": "history"}, "target 'history' is no id feature"),
    "another dim": (
        {"pooling": "target", "target": "item", "table": "own", "dim": 16},
        "feature 'history' has dim 16, its target 'item' 8; give both the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_in_the_config(changes, mistake):
    with pytest.raises(DistmtlError, match="1 mistake") as e:
        parse_config(raw(**changes))
    assert mistake in str(e.value)


@pytest.mark.parametrize("section", [{"sharding": {"types": ["grid_shard"]}}, {"tables": {"item": {"sharding": ["table_row_wise"]}}}])
def test_sharding_that_sequences_cannot_have(section):
    with pytest.raises(DistmtlError, match="'item' is read by a sequence or its target: it needs a sharding type of table_wise, row_wise"):
        parse_config({**raw() | section, "optimizer": {"tables": {"kind": "sgd"}}})


def test_what_the_planner_is_told():
    config = parse_config(
        {**raw(pooling="attention"), "sharding": {"types": ["grid_shard", "row_wise", "table_wise"], "row_wise_above_mb": 0}}
    )
    told = constraints(config, local_world_size=2, world_size=4, device="cpu")
    assert told["item"].pooling_factors == [3.0, 1.0] and told["item"].sharding_types == ["row_wise", "table_wise"]
    assert told["item"].compute_kernels == ["fused"]
    model = offline_model(config, "cpu")
    assert {name for name, _ in table_parameters(model)} == set(config.tables_read)
    assert dense_parameters(model) == sum(p.numel() for p in (*model.model.head.parameters(), *model.model.pooling.parameters()))


def collated(lists, item=None, **changes):
    config = parse_config(raw(**changes))
    table = tiny.table(len(lists)).set_column(3, "tags", pa.array(lists, pa.list_(pa.int64())))
    if item is not None:
        table = table.set_column(2, "item", pa.array(item))
    return Collator(config)(table.append_column(ROW, pa.array(np.arange(len(lists)))))


LONG = [[1, 2, 3, 4, 5], None, [6, 7, 8], [], [9, 10, 11, 12]]


@pytest.mark.parametrize(("too_long", "kept"), [("newest", [3, 4, 5, 6, 7, 8, 10, 11, 12]), ("oldest", [1, 2, 3, 6, 7, 8, 9, 10, 11])])
def test_lists_are_cut_to_their_newest_or_oldest_ids(too_long, kept):
    bag = collated(LONG, too_long=too_long).bags[1]
    assert bag.values.tolist() == kept and bag.lengths.tolist() == [3, 0, 3, 0, 3]


def test_a_list_that_is_too_long_is_refused():
    sentence = "feature 'history': a list of 5 ids at row 0, but max_length is 3; raise it, or set too_long to newest or oldest"
    with pytest.raises(DistmtlError, match=sentence):
        collated(LONG)


@pytest.mark.parametrize(("item", "count", "row"), [([1, None, 3], 0, 1), ([[1], [2], [3, 4]], 2, 2)])
def test_a_target_is_one_id_in_every_row(item, count, row):
    sentence = f"feature 'item': {count} values at row {row}; the target of 'history': every row has exactly one"
    with pytest.raises(DistmtlError, match=sentence):
        collated([[1], [2], []], item, pooling="target", target="item")


def test_what_is_found_before_training(tiny_data):
    """Of types, of the statistics and of a sample of rows."""

    def found(*sequences):
        config = tiny.raw(tiny_data, Path("/runs/tiny"))
        config["features"] += [{**HISTORY, "name": f"sequence_{i}", "table": f"own_{i}", **s} for i, s in enumerate(sequences)]
        with pytest.raises(DistmtlError) as e:
            check_dataset(open_dataset(config["data"]["train"]), parse_config(config), "train")
        return str(e.value)

    assert "has type int64, but feature 'sequence_0' needs lists of integers or strings" in found({"column": "item"})
    assert "feature 'sequence_0': id 19 in " in found({"rows": 10})
    sampled = found({"max_length": 2}, {"pooling": "target", "target": "tags"})
    assert "feature 'sequence_0': a list of 3 ids at " in sampled and "the target of 'sequence_1': every row has exactly one" in sampled


def test_lists_of_one_id_each_are_a_target_too():
    rows = collated([[1], [2], []], [[1], [2], [3]], pooling="target", target="item")
    assert 2 not in rows.bags and rows.single[2].tolist() == [1, 2, 3]
