"""One contract for every head, on two workers: the same as one process without TorchRec, masked rows, bf16, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from heads import HEADS, config_for
from torch import Tensor, nn
from worlds import run_world

from distmtl.config import Config
from distmtl.model.head import Head
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense
from distmtl.verification.reference import unsharded_run
from distmtl.verification.runs import ShortRun, short_run


@pytest.mark.parametrize("kind", HEADS)
def test_two_workers_equal_one_process_without_torchrec(tiny_data, tmp_path, kind):
    """Losses, tables and dense parameters after five steps: every table was stepped once per batch, dense gradients are the same on both
    ranks, and everything learns."""
    config = config_for(kind, tiny_data, tmp_path / "run")
    ranks = run_world(short_run, 2, config)
    first, second = ranks
    assert torch.equal(first.gradients, second.gradients)
    losses, _, expected = unsharded_run(config, ranks)
    assert (first.losses - losses).abs().max() <= 1e-5
    for name, weight in expected.items():
        assert (first.after[name] - weight).abs().max() <= 2e-5, name
        assert torch.equal(first.after[name], second.after[name]), name
    still = [n for n in first.after if torch.equal(first.after[n], first.before[n])]
    assert [n for n in still if not gradient_of(config, first, n).any()] == []  # behind a gate at zero moves may be less than rounding


def gradient_of(config: Config, run: ShortRun, name: str) -> Tensor:
    """A dense parameter's part of the flat gradient of the last step."""
    dense = sorted((f"model.head.{n}", p.numel()) for n, p in Head(config, Layout.of(config)).named_parameters())
    return dict(zip((n for n, _ in dense), run.gradients.split([size for _, size in dense]), strict=True))[name]


def gradients_of_a_step(config: Config, spoil: bool) -> tuple[Tensor, Tensor, int]:
    """Loss terms and dense gradient of one step in which every third row counts for no task; these rows' features spoilt or not."""
    from distmtl.data.splits import open_splits
    from distmtl.distributed.process import process_group
    from distmtl.loop import Training
    from distmtl.progress import Progress

    with process_group(config) as process:
        training = Training(config, process, open_splits(config), Progress(None, False, print))
        batch = next(training.reader.batches(0, 1))
        batch.weights[::3] = 0
        off = batch.weights.amax(1) == 0
        if spoil:
            dense, labels = (torch.where(off[:, None], x, t) for x, t in ((99.0, batch.dense), (torch.nan, batch.labels)))
            ids = batch.sparse.values().clone()
            lengths = batch.sparse.lengths().view(len(batch.sparse.keys()), -1)
            ids[torch.repeat_interleave(off.repeat(len(lengths)), lengths.reshape(-1))] = 1
            sparse = type(batch.sparse)(batch.sparse.keys(), ids, lengths=batch.sparse.lengths(), stride=len(off))
            batch = replace(batch, dense=dense, labels=labels, sparse=sparse)
        numbers = training.pipeline.progress(iter([batch]))
        return numbers.losses, training.optimizers.gradients.clone(), int(off.sum())


@pytest.mark.parametrize("kind", HEADS)
def test_rows_that_count_for_no_task_have_no_influence(tiny_data, tmp_path, kind):
    config = config_for(kind, tiny_data, tmp_path / "run")
    plain, spoilt = (run_world(gradients_of_a_step, 2, config, spoil) for spoil in (False, True))
    for (losses, gradients, off), (other_losses, other_gradients, _) in zip(plain, spoilt, strict=True):
        assert off > 20
        torch.testing.assert_close(losses, other_losses, rtol=0, atol=1e-7)
        torch.testing.assert_close(gradients, other_gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_the_config_knows_which_heads_have_a_cut(kind):
    """By it gradient methods are refused before anything is built."""
    config = config_for(kind, Path(), Path())
    assert hasattr(Head(config, Layout.of(config)).sharing, "cut") == config.network.shares


class Program(nn.Module):
    """What is exported: vectors and domain → outputs."""

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, vectors: list[Tensor], domain: Tensor) -> Tensor:
        return self.head(Features(tuple(vectors), domain))


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_can_be_exported_for_any_batch_size(kind):
    config = config_for(kind, Path(), Path())
    layout = Layout.of(config)
    head = Head(config, layout)
    initialise_dense(head, 0)
    vectors = [torch.randn(7, layout.width) for _ in range(config.copies)]
    domain = torch.arange(7) % 3
    head(Features(tuple(vectors), domain))  # running statistics see every domain
    program, batch = Program(head.eval()), torch.export.Dim("batch", min=2)
    dynamic = {"vectors": [{0: batch} for _ in vectors], "domain": {0: batch}}
    exported = torch.export.export(program, (vectors, domain), dynamic_shapes=dynamic).module()
    more = [torch.randn(11, layout.width) for _ in vectors], torch.arange(11) % 3
    with torch.no_grad():
        torch.testing.assert_close(exported(*more), program(*more), rtol=1e-5, atol=1e-6)
