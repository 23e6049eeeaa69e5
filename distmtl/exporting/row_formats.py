"""How rows of tables are kept in an export: what the files hold, and the bytes that FBGEMM's inference kernels read.

fp32, fp16   weight (rows, columns)
int8         codes (rows, columns) uint8, scale and bias (rows,) float16: a weight is scale·code + bias, every row between its
             least and its largest weight (FBGEMM's row-wise quantisation)
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmtl.exporting.manifest import RowFormat

Rows = dict[str, Tensor]


def pack(rows: Tensor, to: RowFormat) -> Rows:
    """(rows, columns) float32 → tensors of a file."""
    match to:
        case "fp32":
            return {"weight": rows}
        case "fp16":
            return {"weight": rows.half()}
        case "int8":
            fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows, 8)
            scale_bias = fused[:, -4:].contiguous().view(torch.float16)
            return {"codes": fused[:, :-4].contiguous(), "scale": scale_bias[:, 0].contiguous(), "bias": scale_bias[:, 1].contiguous()}


def unpack(rows: Rows) -> Tensor:
    """Tensors of a file → (rows, columns) float32, what the kernels compute with."""
    if "weight" in rows:
        return rows["weight"].float()
    return rows["codes"].float() * rows["scale"].float()[:, None] + rows["bias"].float()[:, None]


def kernel_bytes(rows: Rows) -> Tensor:
    """Tensors of a file → (rows, bytes) as they lie in the kernel's memory: of int8, scale and bias before the codes."""
    if "weight" in rows:
        return rows["weight"].contiguous().view(torch.uint8)
    scale_bias = torch.stack([rows["scale"], rows["bias"]], dim=1).view(torch.uint8)
    return torch.cat([scale_bias, rows["codes"]], dim=1)
