"""Which kernel multiplies float32 matrices on CPU."""

from __future__ import annotations

import functools

import torch

SHAPES = ((512, 416, 256), (256, 2048, 128), (384, 64, 8))  # rows, inner, columns
TOLERANCE = 4.0  # times the error of torch's default kernel


@functools.cache
def fastest_fp32() -> str:
    """Route torch's float32 matrix products to oneDNN, for good, where its result is as exact as the default's. Says what it did.

    torch prefers MKL, .5 and .77 as fast on two AMD machines. The switch allows oneDNN to compute in bfloat16: without AMX it does not,
    with AMX it may. So the error decides, and not the time, which differs from run to run: a resumed run must add up alike.
    """
    if not torch.backends.mkldnn.is_available():
        return "torch's default (no oneDNN)"
    default = _error()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    error = _error()
    if error <= TOLERANCE * default:
        return f"oneDNN (relative error {error:.0e}, torch's default {default:.0e})"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    return f"torch's default: oneDNN's are not float32 here (relative error {error:.0e} instead of {default:.0e})"


def _error() -> float:
    """The largest error against float64, in all layouts that training uses, relative to the root of the inner size."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        exact = a.double() @ b.double()
        for result in (a @ b, a @ b.T.contiguous().T, a.T.contiguous().T @ b):
            worst = max(worst, float((result - exact).abs().max()) / k**0.5)
    return worst
