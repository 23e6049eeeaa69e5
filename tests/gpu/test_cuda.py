"""What to run first on a machine with CUDA (docs/cuda.md). Nobody has yet: here it is only collected."""

import pytest
import tiny
import torch

from distmtl.loop import train
from distmtl.model.kernels import linear_relu, mix, segment_sum, spread

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("weighting", ["static", "pcgrad"])
def test_a_run_on_cuda_learns_what_one_on_cpu_does(tmp_path, weighting):
    tiny.write(tmp_path)
    losses = {}
    for device in ("cpu", "cuda"):
        seen: list[dict] = []
        sections = {"cluster": {"device": device}, "train": {"global_batch_size": 128, "steps": 20, "log_every": 1}}
        sections["weighting"] = {"kind": weighting}
        train(tiny.config(tmp_path, tmp_path / device, **sections), report=seen.append)
        losses[device] = [r["loss"] for r in seen if r["kind"] == "train"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_bf16_on_cuda(tmp_path):
    tiny.write(tmp_path)
    sections = {"cluster": {"device": "cuda"}, "train": {"global_batch_size": 128, "steps": 20, "precision": "bf16"}}
    assert train(tiny.config(tmp_path, tmp_path / "run", **sections))["device"] == "cuda"


def test_kernels_on_cuda():
    x, w, b = (torch.randn(*s, dtype=torch.float64, device="cuda", requires_grad=True) for s in ((9, 5), (3, 4, 5), (3, 4)))
    assert torch.autograd.gradcheck(lambda x, w, b: tuple(linear_relu([x] * 3, w, b)), (x, w, b))
    gates, experts = (torch.randn(*s, dtype=torch.float64, device="cuda", requires_grad=True) for s in ((2, 3, 9), (3, 9, 4)))
    assert torch.autograd.gradcheck(lambda g, e: tuple(mix(g, list(e))), (gates, experts))
    lengths = torch.tensor([4, 0, 5], device="cuda")
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, lengths), x)
    assert torch.autograd.gradcheck(lambda x: spread(x[:3], lengths, 9), x)
