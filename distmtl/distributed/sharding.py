"""Tables → sharding plan → DistributedModelParallel, with initial weights that do not depend on the plan."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from distmtl.config import AdagradTable, AdamTable, Config, RowWiseAdagradTable, SgdTable
from distmtl.distributed.exchange import codecs
from distmtl.distributed.plan import PlannedTable, describe
from distmtl.distributed.planner import make_plan, sharders
from distmtl.distributed.process import Process
from distmtl.errors import DistmtlError

INIT_ROWS = 65_536  # rows initialised from one seed
UNCHECKED = {"bounds_check_mode": BoundsCheckMode.NONE}  # the reader lets no id out of its table pass; FBGEMM would set it to 0


def attach_table_optimizers(tables: nn.Module, config: Config, device: torch.device) -> None:
    """Give every table its own optimizer, which FBGEMM runs inside backward.

    Raises:
        DistmtlError: an optimizer that FBGEMM does not have on this device.
    """
    kind: type[torch.optim.Optimizer]
    arguments: dict[str, Any]
    for name, parameter in table_parameters(tables):
        optimizer = config.table_optimizer(name)
        match optimizer:
            case SgdTable():
                kind, arguments = torch.optim.SGD, {"lr": optimizer.lr}
            case AdagradTable():
                kind, arguments = torch.optim.Adagrad, {"lr": optimizer.lr, "eps": optimizer.eps}
            case RowWiseAdagradTable():
                kind, arguments = torchrec.optim.RowWiseAdagrad, {"lr": optimizer.lr, "eps": optimizer.eps}
            case AdamTable():
                if device.type != "cuda":
                    raise DistmtlError(
                        f"table {name!r}: optimizer adam has no kernel on {device.type}; use rowwise_adagrad, adagrad or sgd"
                    )
                beta1, beta2 = optimizer.betas
                kind, arguments = torchrec.optim.Adam, {"lr": optimizer.lr, "beta1": beta1, "beta2": beta2, "eps": optimizer.eps}
        apply_optimizer_in_backward(kind, [parameter], arguments)


def table_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Table name, weight, for every table of an unsharded model."""
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            yield from ((name, table.weight) for name, table in module.embedding_bags.items())
        elif isinstance(module, EmbeddingCollection):
            yield from ((name, table.weight) for name, table in module.embeddings.items())


def shard(model: nn.Module, config: Config, process: Process) -> tuple[DistributedModelParallel, list[PlannedTable]]:
    """Spread the tables of `model` over the ranks. Dense parameters stay whole on each; Optimizers sums their gradients, and TorchRec
    those of the tables, of which it would take the mean."""
    set_gradient_division(False)
    attach_table_optimizers(model, config, process.device)
    plan = make_plan(model, config, process)
    planned = list(describe(plan, config))
    with undrawn_tables():
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=process.device,
            plan=plan,
            sharders=sharders(UNCHECKED, codecs(config, process.world_size)),
            init_data_parallel=False,
        )
    missing = {t.table for t in planned if any(rank == process.rank for rank, *_ in t.shards)} - {
        key.rsplit(".", 2)[1] for key in sharded.fused_optimizer.params
    }
    assert not missing, f"tables without their own optimizer: {missing}"
    initialise_tables(sharded, config)
    return sharded, planned


@contextmanager
def undrawn_tables() -> Iterator[None]:
    """TorchRec draws every table as it makes it, in as much time as `initialise_tables` takes to draw it anew."""
    kernels = (BaseBatchedEmbeddingBag, BaseBatchedEmbedding)
    draw = [kernel.init_parameters for kernel in kernels]
    for kernel in kernels:
        kernel.init_parameters = lambda self: None
    try:
        yield
    finally:
        for kernel, own in zip(kernels, draw, strict=True):
            kernel.init_parameters = own


def step_counters(sharded: nn.Module) -> list[Tensor]:
    """By which FBGEMM's `adam` corrects its bias, one per group of tables on this rank. They are in no state dict, and evaluation moves
    them too."""
    lookups = [lookup for module in sharded.modules() for lookup in getattr(module, "_lookups", ())]
    groups = [m for lookup in lookups for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
    return [group.iter_cpu for group in groups if group.optimizer == EmbOptimType.ADAM]


def dense_parameters(model: nn.Module, planned: list[PlannedTable]) -> dict[str, nn.Parameter]:
    """Everything that no sharded table holds."""
    tables = tuple(f".{kind}.{t.table}.weight" for t in planned for kind in ("embedding_bags", "embeddings"))
    return {name: p for name, p in model.named_parameters() if not name.endswith(tables)}


def local_shards(state: dict[str, Any]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Name, tensor and offsets of every shard of the sharded tensors in a state dict that lies on this rank."""
    for name, value in state.items():
        if hasattr(value, "local_shards"):
            for s in value.local_shards():
                yield name, s.tensor, tuple(s.metadata.shard_offsets)


def initialise_tables(sharded: DistributedModelParallel, config: Config) -> None:
    """Uniform in ±init_scale, drawn by (seed, table, block of rows): the same table whatever the plan."""
    dims = {table: dim for table, (_, dim) in config.tables_read.items()}
    with torch.no_grad():
        for key, tensor, (row, column) in local_shards(sharded.state_dict()):
            table = key.split(".")[-2]
            for block in range(row // INIT_ROWS, (row + tensor.shape[0] - 1) // INIT_ROWS + 1 if tensor.shape[0] else 0):
                first, last = max(row, block * INIT_ROWS), min(row + tensor.shape[0], (block + 1) * INIT_ROWS)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{config.run.seed}/{table}/{block}".encode()))
                target, whole = tensor[first - row : last - row], tensor.shape[1] == dims[table] and first == block * INIT_ROWS
                drawn = target if whole and target.device.type == "cpu" else torch.empty(last - block * INIT_ROWS, dims[table])
                drawn.uniform_(-config.init_scale(table), config.init_scale(table), generator=generator)
                if drawn is not target:
                    target.copy_(drawn[first - block * INIT_ROWS :, column : column + tensor.shape[1]])
