"""How pooled vectors and their gradients travel between ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import CommOp, NoOpQuantizedCommCodec, QuantizedCommCodecs

from distmtl.config import Config


class _Rounded(NoOpQuantizedCommCodec[Any]):
    """bfloat16 on the way and on arrival: what reads the vectors casts them (kernels.side_by_side), and writes gradients in their
    precision. Sums from one rank that a bf16 head reads are rounded as it would have rounded them, and no pass over them is added."""

    def encode(self, input_tensor: Tensor, ctx: Any = None) -> Tensor:
        return input_tensor.bfloat16()


class _Widened(_Rounded):
    """The same, and float32 again on arrival, which the tables' backward wants."""

    def decode(self, input_grad: Tensor, ctx: Any = None) -> Tensor:
        return input_grad.float()


def codecs(config: Config, world_size: int) -> dict[str, Any] | None:
    """For every way from rank to rank that TorchRec knows; None: in float32. Vectors of lists, which are pooled in float32 where they
    arrive, are rounded only where `sharding.exchange` says so."""
    if world_size == 1 or config.exchange == "fp32":
        return None
    pooled = QuantizedCommCodecs(forward=_Rounded(), backward=_Widened())
    every: dict[str, Any] = {op.name: pooled for op in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER)}
    if config.sharding.exchange:
        bf16 = QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16)
        device = torch.device("cuda")  # on "cpu" it would be float16, too narrow for gradients
        every |= get_qcomm_codecs_registry(bf16, [CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL], device) or {}
    return every
