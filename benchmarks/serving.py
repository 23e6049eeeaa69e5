"""Candidates per second of an export on one core, beside the bare model: through Predictor, and over HTTP.

    .venv/bin/python -m benchmarks.serving runs/quickstart [RUN …] [--rounds 60] [--out benchmarks/results]

bare        MultiTaskModel forward on a ready KeyedJaggedTensor: TorchRec's unsharded tables filled from the checkpoint, eager,
            inference mode, one thread
Predictor   from an Arrow table in memory to numpy scores, the same rows
HTTP        `distmtl serve`, its replica pinned to one core and all else to the others; the first half of the columns are the context.
            One client that asks again and again (p50, p99), then four at once (candidates/s).
            CPU: CPU seconds of the replica, and of replica and proxy, for a candidate, beside bare's.

Rounds are interleaved, other rows in each; medians of CPU seconds, since other programs may run. Writes serving.json and serving.md.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from benchmarks.gemms import cpu_seconds
from benchmarks.limit import keep_memory
from benchmarks.record import Record
from benchmarks.servers import PROXY, REPLICA, Client, bodies, server
from distmtl import Predictor, checkpoint, export
from distmtl.config import Config
from distmtl.data.collate import ROW
from distmtl.data.dataset import open_dataset
from distmtl.data.rows import batch_of
from distmtl.distributed.matmul import fastest_fp32
from distmtl.distributed.process import quieten
from distmtl.model.multitask import MultiTaskModel
from distmtl.run_directory import checkpoint_config, find_checkpoint
from distmtl.serving.comparison import first_rows

FORMATS = ("fp32", "int8")
CANDIDATES = (1, 64, 512)
BLOCKS = 24  # other rows in every round
CLIENTS = 4


def bare_model(path: str, config: Config, predictor: Predictor) -> nn.Module:
    """The model as it was trained, with the tables that the predictor holds."""
    model = MultiTaskModel(config, torch.device("cpu"))
    for tables in (model.embeddings, model.sequences):  # on "meta" until they are sharded
        tables.to_empty(device=torch.device("cpu"))
    dense = {k.removeprefix("model."): v for k, v in checkpoint.dense(find_checkpoint(path)).items() if k.startswith("model.")}
    model.load_state_dict(dense, strict=False)
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("embeddings", "sequences"):
            parameter.data.copy_(predictor.lookup.weights[name.split(".")[-2]].view(torch.float32))
    return model.eval()


def in_process(path: str, exports: dict[str, str], table: pa.Table, rounds: int) -> list[dict[str, Any]]:
    config = checkpoint_config(find_checkpoint(path))
    predictors = {f: Predictor(e) for f, e in exports.items()}
    model, collate, out = bare_model(path, config, predictors["fp32"]), predictors["fp32"].collate, []
    for n in CANDIDATES:
        tables = [table.slice(i * n % (table.num_rows - n), n).combine_chunks() for i in range(BLOCKS)]
        batches = [batch_of([(collate(t.append_column(ROW, pa.array(np.arange(n)))), 0, n)], collate.keys, n) for t in tables]
        calls: dict[str, Callable[[int], object]] = {"bare": lambda i, batches=batches: model(batches[i])}  # type: ignore[misc]
        calls |= {f: lambda i, p=p, tables=tables: p(tables[i]) for f, p in predictors.items()}  # type: ignore[misc]
        seen: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            if n > 1:
                expected = torch.cat([model(b)[:, :1] for b in batches[:2]]).sigmoid()[:, 0].numpy()
                got = np.concatenate([predictors["fp32"](t)[config.tasks[0].name] for t in tables[:2]])
                assert config.tasks[0].kind != "binary" or np.abs(got - expected).max() < 0.2, "not the same model"
            for r in range(rounds + 3):
                for name, call in calls.items():
                    seconds = cpu_seconds(lambda call=call, r=r: call(r % BLOCKS))  # type: ignore[misc]
                    if r >= 3:
                        seen[name].append(seconds)
        for f in FORMATS:
            ratio = median(b / p for b, p in zip(seen["bare"], seen[f], strict=True))
            out.append({"rows as": f, "candidates": n, "bare ms": median(seen["bare"]) * 1e3, "Predictor ms": median(seen[f]) * 1e3})
            out[-1] |= {"Predictor/s": n / median(seen[f]), "Predictor/bare": ratio}
    return out


def over_http(exports: dict[str, str], table: pa.Table, context: list[str], rounds: int) -> dict[tuple[str, int], dict[str, float]]:
    out = {}
    with server(*(f"{f}={e}" for f, e in exports.items())) as s:
        replica, proxy = s.found(REPLICA)[0], s.found(PROXY)[0]
        cores = sorted(os.sched_getaffinity(0))
        for p in s.found(""):
            for thread in p.threads():
                os.sched_setaffinity(thread.id, cores[-1:] if p.pid == replica.pid else cores[:-1] or cores)
        os.sched_setaffinity(0, cores[:-1] or cores)
        for n in CANDIDATES:
            for f in FORMATS:
                sent = bodies(table, context, n, BLOCKS, version=f)
                one = Client(s.port)
                ask(one, sent, 20)
                latencies = ask(one, sent, rounds * 5)
                before = cpu(replica), cpu(proxy)
                began = time.perf_counter()
                threads = [threading.Thread(target=ask, args=(Client(s.port), sent, rounds * 2)) for _ in range(CLIENTS)]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
                seconds, scored = time.perf_counter() - began, n * rounds * 2 * CLIENTS
                used = cpu(replica) - before[0], cpu(proxy) - before[1]
                out[f, n] = {"p50 ms": float(np.percentile(latencies, 50)) * 1e3, "p99 ms": float(np.percentile(latencies, 99)) * 1e3}
                out[f, n] |= {"HTTP/s": scored / seconds, "replica CPU": used[0] / scored, "replica and proxy CPU": sum(used) / scored}
        os.sched_setaffinity(0, cores)
    return out


def ask(client: Client, sent: list[bytes], times: int) -> list[float]:
    """Seconds of every request."""
    out = []
    for i in range(times):
        began = time.perf_counter()
        status, answer = client.ask("POST", "/v1/score", sent[i % len(sent)])
        out.append(time.perf_counter() - began)
        assert status == 200, answer
    return out


def cpu(process: Any) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(path: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    config = checkpoint_config(find_checkpoint(path))
    exports = {f: str(folder / f) for f in FORMATS}
    for f in FORMATS:
        export(path, exports[f], f, say=lambda text: None)  # type: ignore[arg-type]
    dataset = open_dataset(config.data.test or config.data.train)
    schema = Predictor(exports["fp32"]).schema
    table = first_rows(dataset, schema.names, BLOCKS * max(CANDIDATES)).cast(schema).combine_chunks()
    rows = in_process(path, exports, table, rounds)
    served = over_http(exports, table, schema.names[: len(schema.names) // 2], rounds)
    for row in rows:
        got = served[row["rows as"], row["candidates"]]
        bare = row["bare ms"] / 1e3 / row["candidates"]
        row |= {k: got[k] for k in ("p50 ms", "p99 ms", "HTTP/s")}
        row |= {"HTTP/bare": got["HTTP/s"] * bare}
        row |= {"bare/replica CPU": bare / got["replica CPU"], "bare/replica and proxy CPU": bare / got["replica and proxy CPU"]}
    return [{"model": config.name, **row} for row in rows]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+")
    p.add_argument("--rounds", type=int, default=60)
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    a, record, results = p.parse_args(), Record(), []
    keep_memory()
    quieten()
    torch.set_num_threads(1)
    product = fastest_fp32()
    for run in a.runs:
        with TemporaryDirectory() as name:
            results += measure(run, a.rounds, Path(name))
    lines = ["# Serving on one core, beside the bare model", "", f"| {' | '.join(results[0])} |", "|---:" * len(results[0]) + "|"]
    lines += [
        f"| {' | '.join(v if isinstance(v, str) else f'{v:,.4g}' if v < 1000 else f'{v:,.0f}' for v in r.values())} |" for r in results
    ]
    lines += ["", __doc__.split("\n\n")[2]]
    record.write(a.out, "serving", {"serving": results}, lambda report: "\n".join(lines), products=product)


if __name__ == "__main__":
    main()
