"""Tables in memory as FBGEMM's inference kernels read them: one kernel call for all bags, one per width for lists."""

from __future__ import annotations

from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.tbe.config.embedding_config import BoundsCheckMode, EmbeddingLocation, PoolingMode
from safetensors.torch import load_file
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from distmtl.config import Config
from distmtl.errors import DistmtlError
from distmtl.exporting.manifest import RowFormat
from distmtl.exporting.program import bags, lists
from distmtl.exporting.row_formats import kernel_bytes

TYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8}
Changed = dict[str, tuple[Tensor, Tensor]]  # table → numbers of rows, and their bytes


class Lookup:
    """The tables of a config.

    call: the embedded features of B rows → sums of the bags side by side (B, width), every list's embeddings (N, dim x copies),
    float32, both in config order
    """

    def __init__(self, config: Config, row_format: RowFormat):
        self.keys = [f.name for f in config.embedded]
        self.bags, self.lists = bags(config), lists(config)
        self.weights: dict[str, Tensor] = {}  # table → (rows, bytes), a view of the kernel's memory
        self.pooled = self._kernel(config, self.bags, row_format, PoolingMode.SUM) if self.bags else None
        widths = {name: config.tables_read[f.table_name][1] for f in config.embedded if (name := f.name) in self.lists}
        self.of_width = {w: [name for name in self.lists if widths[name] == w] for w in dict.fromkeys(widths.values())}
        self.unpooled = {w: self._kernel(config, names, row_format, PoolingMode.NONE) for w, names in self.of_width.items()}

    def _kernel(
        self, config: Config, features: list[str], row_format: RowFormat, pooling: PoolingMode
    ) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        reads = [f.table_name for f in config.embedded if f.name in features]
        tables = list(dict.fromkeys(reads))
        kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(t, *config.tables_read[t], TYPES[row_format], EmbeddingLocation.HOST) for t in tables],
            feature_table_map=[tables.index(t) for t in reads],
            pooling_mode=pooling,
            device="cpu",
            output_dtype=SparseType.FP32,
            row_alignment=1,
            bounds_check_mode=BoundsCheckMode.NONE,  # the collator has checked them
            indices_dtype=torch.int64,
        )
        kernel.initialize_weights()
        self.weights |= dict(zip(tables, (weights for weights, _ in kernel.split_embedding_weights(split_scale_shifts=False)), strict=True))
        return kernel

    def load(self, folder: Path) -> None:
        """All rows, from a full export's files.

        Raises:
            DistmtlError: they are not the tables' rows.
        """
        for table, weights in self.weights.items():
            done = 0
            for file in sorted((folder / "tables" / table).glob("*.safetensors"), key=lambda file: int(file.stem)):
                rows = kernel_bytes(load_file(file))
                if int(file.stem) != done or done + len(rows) > len(weights) or rows.shape[1:] != weights.shape[1:]:
                    raise DistmtlError(f"export {folder}: {file.name} has other rows than table {table!r}; export again")
                weights[done : done + len(rows)].copy_(rows)
                done += len(rows)
            if done < len(weights):
                raise DistmtlError(f"export {folder}: {done:,} of {len(weights):,} rows of table {table!r} are there; export again")

    def changed(self, folder: Path) -> Changed:
        """The rows of a delta's files.

        Raises:
            DistmtlError: the tables have no such rows.
        """
        out: Changed = {}
        for table, weights in self.weights.items():
            if (file := folder / "tables" / table / "changed.safetensors").exists():
                numbers = (stored := load_file(file)).pop("rows")
                rows = kernel_bytes(stored)
                within = len(numbers) == len(rows) and bool(((numbers >= 0) & (numbers < len(weights))).all())
                if not within or rows.shape[1:] != weights.shape[1:]:
                    raise DistmtlError(f"delta {folder}: rows that table {table!r} does not have; publish a full export")
                out[table] = numbers, rows
        return out

    def update(self, changed: Changed) -> None:
        """Take a delta's rows in."""
        for table, (numbers, rows) in changed.items():
            self.weights[table].index_copy_(0, numbers, rows)

    def __call__(self, ids: KeyedJaggedTensor) -> tuple[Tensor, list[Tensor]]:
        of_bags = self._of(ids, self.bags)
        pooled = self.pooled(of_bags.values(), of_bags.offsets()) if self.pooled else torch.zeros(ids.stride(), 0)
        found: dict[str, Tensor] = {}
        for width, names in self.of_width.items():
            of_lists = self._of(ids, names)
            embeddings = self.unpooled[width](of_lists.values(), of_lists.offsets())
            found |= dict(zip(names, embeddings.split(of_lists.length_per_key()), strict=True))
        return pooled, [found[name] for name in self.lists]

    def _of(self, ids: KeyedJaggedTensor, features: list[str]) -> KeyedJaggedTensor:
        return ids if features == self.keys else ids.permute([self.keys.index(name) for name in features])
