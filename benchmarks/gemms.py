"""The matrix products that a network does, found by watching one step of it, and how long they take alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmtl.config import Config
from distmtl.distributed.matmul import fastest_fp32
from distmtl.model.head import Head
from distmtl.model.layout import Features, Layout
from distmtl.model.multitask import initialise_dense

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@dataclass(frozen=True)
class Product:
    """(rows, inner) times (inner, columns), and which of the two lie transposed in memory."""

    rows: int
    inner: int
    columns: int
    transposed: tuple[bool, bool] = (False, False)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sizes = ((self.rows, self.inner), (self.inner, self.columns))
        a, b = (torch.randn(s[::-1]).to(dtype).T if t else torch.randn(s).to(dtype) for s, t in zip(sizes, self.transposed, strict=True))
        return a, b


class Watch(TorchDispatchMode):
    """Notes every matrix product beneath autograd, backward's and those of distmtl's own kernels too."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        match func.overloadpacket._qualified_op_name.removesuffix("_"):
            case "aten::mm" | "aten::bmm":
                self._note(args[0], args[1])
            case "aten::addmm" | "aten::baddbmm":
                self._note(args[1], args[2])
            case "mkldnn::_linear_pointwise":
                self._note(args[0], args[1].mT)
        return func(*args, **(kwargs or {}))

    def _note(self, a: Tensor, b: Tensor) -> None:
        of = Product(a.shape[-2], a.shape[-1], b.shape[-1], (a.stride(-1) != 1, b.stride(-1) != 1))
        self.products += [of] * a.shape[:-2].numel()


def watched(step: Callable[[], object]) -> list[Product]:
    """The products of one step."""
    with Watch() as watch:
        step()
    return watch.products


def head_step(config: Config, rows: int) -> tuple[Head, Callable[[], object]]:
    """A config's head, and its forward and backward alone, down to the gradient of random features."""
    layout = Layout.of(config)
    head = Head(config, layout)
    initialise_dense(head, config.run.seed)
    dtype = DTYPES[config.train.precision]
    vectors = tuple(torch.randn(rows, layout.width, dtype=dtype, requires_grad=True) for _ in range(config.copies))
    domain = torch.randint(layout.domains, (rows,)) if layout.domains else None
    features, leaves = Features(vectors, domain), [*vectors, *head.parameters()]
    gradient = torch.randn_like(head(features))
    return head, lambda: torch.autograd.grad(head(features), leaves, gradient)


def products(config: Config, rows: int) -> list[Product]:
    """What the head of a config multiplies in a step of so many rows."""
    _, step = head_step(config, rows)
    return watched(step)


class Gemms:
    """Products alone, each by the fastest of torch's default, the same transposed, and oneDNN's linear layer."""

    def __init__(self, products: Iterable[Product], dtype: torch.dtype):
        fastest_fp32()
        self.work: list[Callable[[], object]] = []
        fastest: dict[Product, Callable[[], object]] = {}
        linear = torch.ops.mkldnn._linear_pointwise
        for product in products:
            if product not in fastest:
                a, b = product.operands(dtype)
                fastest[product] = _fastest(
                    lambda a=a, b=b: a @ b,
                    lambda a=a, b=b: (b.T @ a.T).T,
                    lambda a=a, b=b: linear(a.contiguous(), b.T.contiguous(), None, "none", [], ""),
                )
            self.work.append(fastest[product])

    def __call__(self) -> None:
        for product in self.work:
            product()


def _fastest(*candidates: Callable[[], object]) -> Callable[[], object]:
    times: dict[int, float] = {}
    for i, f in enumerate(candidates):
        f()
        times[i] = min(cpu_seconds(f) for _ in range(3))
    return candidates[min(times, key=lambda i: times[i])]
