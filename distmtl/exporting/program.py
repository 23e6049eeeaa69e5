"""The part of a model that is no table, as torch.export keeps it: a program without Python, loaded without a pickle."""

from __future__ import annotations

import io
import linecache
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import graph_module
from torchrec import JaggedTensor, KeyedTensor

from distmtl.config import Config
from distmtl.errors import DistmtlError
from distmtl.exporting.archive import refuse_code
from distmtl.model.embeddings import FeatureVector
from distmtl.model.head import Head
from distmtl.model.layout import Layout
from distmtl.model.sequences import SequencePooling

Run = Callable[[Tensor, list[Tensor], Tensor, Tensor, Tensor | None], Tensor]
LEAST = 2  # rows of a batch, and ids of each sequence feature in it: torch.export makes constants of sizes 0 and 1


def bags(config: Config) -> list[str]:
    """Features whose vectors the tables give already pooled, in config order."""
    return [f.name for f in config.embedded if f.table_name not in config.sequence_tables]


def lists(config: Config) -> list[str]:
    """Features that need the embedding of every id, in config order."""
    return [f.name for f in config.embedded if f.table_name in config.sequence_tables]


def hashes(config: Config) -> list[int]:
    """Rows that an id reads, of all embedded features in config order: a list's number of embeddings is a multiple of it."""
    return [getattr(f, "hashes", 1) for f in config.embedded]


class Program(nn.Module):
    """MultiTaskModel behind its tables, with its parameters' names.

    forward: sums of the bags side by side (B, width), every list's embeddings (N, dim x copies), lengths of all embedded features
    (F, B) in config order, numbers (B, dense width), domain (B,) where the head asks for it → outputs (B, O), float32
    """

    def __init__(self, config: Config):
        super().__init__()
        self.pooling, self.features, self.head = SequencePooling(config), FeatureVector(config), Head(config, Layout.of(config))
        self.keys, self.bags, self.lists = [f.name for f in config.embedded], bags(config), lists(config)
        self.widths = [f.dim * config.copies for f in config.embedded if f.name in self.bags]
        self.tasks = len(config.tasks)

    def forward(self, pooled: Tensor, lists: list[Tensor], lengths: Tensor, dense: Tensor, domain: Tensor | None) -> Tensor:
        bags = KeyedTensor(self.bags, self.widths, pooled)
        jagged = {name: JaggedTensor(x, lengths=lengths[self.keys.index(name)]) for name, x in zip(self.lists, lists, strict=True)}
        ids = JaggedTensor(torch.zeros(0), lengths=lengths.reshape(-1))  # of which FeatureVector reads the lengths alone
        real = torch.ones(dense.shape[0], self.tasks)
        return self.head(self.features(bags, self.pooling([jagged]), ids, dense, domain, real))


def save(config: Config, parameters: dict[str, Tensor]) -> bytes:
    """The program with a checkpoint's dense tensors.

    Raises:
        DistmtlError: torch.export cannot follow the head (a plug-in, say).
    """
    program = Program(config)
    own = {name.removeprefix("model."): value for name, value in parameters.items() if name.startswith("model.")}
    program.load_state_dict({name: own[name] for name in program.state_dict()})
    program.eval()
    rows, batch, per_row = torch.export.Dim("rows", min=LEAST), 5, dict(zip(program.keys, hashes(config), strict=True))
    lengths = torch.tensor([[3 * n] * batch for n in per_row.values()], dtype=torch.int32)
    width = {f.name: f.dim * config.copies for f in config.embedded}
    example = (
        torch.zeros(batch, sum(program.widths)),
        [torch.zeros(batch * 3 * per_row[name], width[name]) for name in program.lists],
        lengths,
        torch.zeros(batch, sum(f.width for f in config.dense)),
        torch.zeros(batch, dtype=torch.int64) if config.domain else None,
    )
    dynamic = (
        {0: rows},
        [{0: per_row[name] * torch.export.Dim(f"ids_{i}", min=LEAST)} for i, name in enumerate(program.lists)],
        {1: rows},
        {0: rows},
        {0: rows} if config.domain else None,
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(program, example, dynamic_shapes=dynamic, strict=False)
            exported._example_inputs = None  # they would be pickled
            file = io.BytesIO()
            torch.export.save(exported, file)
    except Exception as e:  # whatever a head of the user's own does
        raise DistmtlError(f"model {config.model.kind} cannot be exported: torch.export says {type(e).__name__}: {e}") from e
    refuse_code(file, f"model {config.model.kind}")
    return file.getvalue()


def load(file: Any, where: str) -> Run:
    """The program in a file, ready to run.

    Raises:
        DistmtlError: it is damaged, or holds more than a graph of operators and tensors.
    """
    refuse_code(file, where)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(file).module(check_guards=False)  # guards are Python code of the file's
    except Exception as e:
        raise DistmtlError(f"{where} cannot be loaded: {type(e).__name__}: {e}; export again with this version") from e
    # Not the module itself: before each call it would compare sizes that Predictor's are anyway.
    run = _flat(module).forward
    _forget_sources()
    return run


def _forget_sources() -> None:
    """torch.fx keeps the source of every graph that it ever compiled, for tracebacks: of a server that reloads for months, too many."""
    graph_module._loader.eval_cache.clear()
    for name in [name for name in linecache.cache if name.startswith("<eval_with_key>")]:
        del linecache.cache[name]


def _flat(module: Any) -> Any:
    """The graph with the blocks put in that only say `no autocast`: nothing here is in autocast, and each costs a call through Python."""
    graph = module.graph
    for block in [n for n in graph.nodes if n.target is torch.ops.higher_order.wrap_with_autocast and not n.args[2]]:
        inner, *given = block.args[4:]
        nodes = list(_flat(getattr(module, inner.target)).graph.nodes)
        takers = list(block.users)
        if any(n.op == "get_attr" for n in nodes) or any(user.target is not operator.getitem for user in takers):
            continue
        now = dict(zip((n for n in nodes if n.op == "placeholder"), given, strict=True))
        with graph.inserting_before(block):
            for node in nodes:
                if node.op not in ("placeholder", "output"):
                    now[node] = graph.node_copy(node, now.__getitem__)
        for user in takers:
            user.replace_all_uses_with(now[nodes[-1].args[0][user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(block)
        graph.erase_node(inner)
    module.recompile()
    return module
