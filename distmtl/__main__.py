"""The command line: `distmtl COMMAND --help` shows each command with an example."""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from distmtl.errors import DistmtlError

# Commands import what they need themselves: --help answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return arguments.run(arguments) or 0
    except (DistmtlError, OSError) as e:  # an OSError is a disk or a permission: its text says which
        if getattr(arguments, "debug", False):
            raise
        print(f"distmtl {arguments.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"distmtl {arguments.command}: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value may stand anywhere: argparse itself loses those behind an option."""
    arguments, rest = parser().parse_known_args(argv)
    strange = [r for r in rest if r.startswith("-") or "=" not in r or not hasattr(arguments, "overrides")]
    if strange:
        parser().error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        arguments.overrides += rest
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="distmtl", description="Train multi-task recommendation models on sharded embedding tables.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=help, description=help, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        p.set_defaults(run=run)
        return p

    p = command(
        "synth",
        synth,
        "Write a synthetic click log whose best reachable metrics are known.",
        "distmtl synth --out data/synthetic --rows 600000",
    )
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    p.add_argument("--rows", type=int, default=600_000, help="rows of all splits together (default: %(default)s)")
    p.add_argument("--wide", action="store_true", help="24 id features, 2 bags and 8 numbers over tables of up to 2,000,000 rows, instead")
    p.add_argument(
        "--conflict", type=float, nargs="?", const=1.0, metavar="STRENGTH",
        help="three tasks that want opposed things of the same features, instead; 0 to 1 says how opposed (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--drift", type=float, nargs="?", const=1.0, metavar="STRENGTH",
        help="sealed daily partitions whose truth changes from day to day, for --follow, instead; how fast (default: 1; 0: not at all)",
    )  # fmt: skip
    p.add_argument("--partitions", type=int, metavar="N", help="days of a --drift log (default: 14)")
    p.add_argument("--users", type=int, help="distinct users, up to 1e8 (default: 20000)")
    p.add_argument("--items", type=int, help="distinct items, up to 1e8 (default: 5000)")
    p.add_argument("--domains", type=int, help="domains that differ in their signal (default: 1)")
    p.add_argument("--confounding", type=float, help="strength of a hidden cause of both clicks and conversions (default: 0)")
    p.add_argument("--kept-negatives", type=float, help="share of the impressions without a click that the train split keeps (default: 1)")
    p.add_argument("--seed", type=int, default=0)

    p = command(
        "prepare", prepare, "Turn a public data set's raw files into Parquet and ready configs.",
        "distmtl prepare census-income --source ~/census --out data/census",
    )  # fmt: skip
    p.add_argument("name", help="census-income or movielens-1m")
    p.add_argument("--source", required=True, type=Path, metavar="DIR", help="folder with the raw files")
    p.add_argument("--out", required=True, type=Path, metavar="DIR")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options of the data set, such as protocol=P2 or fold=1")

    p = command(
        "init", init, "Guess a first config from a CSV or Parquet log, explain every line of it, and write splits to train on.",
        "distmtl init logs.csv --labels click,purchase --out data/logs",
    )  # fmt: skip
    p.add_argument("data", metavar="DATA", help="a file, a folder or a glob")
    p.add_argument("--labels", required=True, type=names, metavar="COLUMN[,…]", help="what is to be predicted")
    p.add_argument("--out", type=Path, metavar="DIR", help="new folder for config and splits (default: NAME-distmtl)")
    p.add_argument("--group", metavar="COLUMN", help="groups of GAUC (default: a column called like a user or a session)")
    p.add_argument(
        "--time", metavar="COLUMN", help="the last rows by it are held out (default: a column that is a time; without one, at random)"
    )
    p.add_argument("--weight", metavar="COLUMN", help="sample weights (default: none)")
    p.add_argument("--leave-out", type=names, default=[], metavar="COLUMN[,…]", help="columns to make nothing of")

    p = command(
        "train",
        train,
        "Train: on Ray Train workers, or as one rank under torchrun.",
        "distmtl train configs/synthetic.yaml train.epochs=2 --workers 2",
    )
    config_arguments(p)
    p.add_argument(
        "--workers", type=workers, metavar="N|MIN-MAX", help="shorthand for cluster.workers; MIN-MAX: as many as the cluster has room for"
    )  # fmt: skip
    p.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="continue the run in run.dir (auto, the default), insist on a new one (never), or start from a checkpoint",
    )  # fmt: skip
    p.add_argument(
        "--resume-policy", default="strict", choices=["strict", "matching"],
        help="matching: where features, tables, tasks, the head or the weighting differ from the checkpoint's, load what still "
        "fits and say what does not",
    )  # fmt: skip
    p.add_argument(
        "--follow", metavar="DIR",
        help="train the partitions below DIR (day=…/hour=…) once each, in name order, when a _SUCCESS file is in them, and wait for more",
    )  # fmt: skip
    end = p.add_mutually_exclusive_group()
    end.add_argument(
        "--partitions", type=positive, metavar="N", help="with --follow: end when N partitions are trained in all (default: never)"
    )
    end.add_argument("--idle-timeout", type=seconds, metavar="S", help="with --follow: end when no new partition came for S seconds")
    p.add_argument(
        "--publish", type=Path, metavar="DIR", help="with --follow: export to this folder, which distmtl serve follows, after each"
    )
    p.add_argument(
        "--full-every", type=int, metavar="K", help="with --publish: every K-th export is a full one, between are deltas (default: 24)"
    )
    p.add_argument("--quantize", choices=["int8", "fp16"], help="with --publish: rows of tables kept smaller (default: fp32)")

    p = command(
        "evaluate",
        evaluate,
        "Per-task metrics of a checkpoint or of a run's best one.",
        "distmtl evaluate runs/synthetic --data data/synthetic/test --slices user_id,item_id:1,10",
    )
    p.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    p.add_argument("--data", metavar="PATH", help="Parquet to evaluate on (default: the config's test split)")
    p.add_argument(
        "--slices", default="", metavar="FEATURE[,…]",
        help="metrics also by how often training saw a row's id of a feature (item_id: 0, 1-4, 5-49, 50+ times; item_id:1,10 with other "
        "edges), or by its value (domain=)",
    )  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the metrics as JSON")

    p = command(
        "export", export, "Turn a checkpoint into one directory that predict and serve need nothing else for.",
        "distmtl export runs/synthetic --out exports/synthetic --quantize int8",
    )  # fmt: skip
    p.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--quantize", choices=["int8", "fp16"], help="keep rows of tables smaller, and print what that costs (default: fp32)")
    p.add_argument("--verify", action="store_true", help="score a sample of the config's data by the checkpoint too; differences fail")

    p = command(
        "predict", predict, "Score Parquet with an export, in the same order; bad rows go aside with a reason. The same command continues.",
        "distmtl predict exports/synthetic --data data/synthetic/test --out predictions",
    )  # fmt: skip
    p.add_argument("export", metavar="EXPORT")
    p.add_argument("--data", required=True, metavar="PATH", help="a file, a folder or a glob, local or remote")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--workers", type=positive, default=1, metavar="N", help="Ray workers; 1: this process alone (default: %(default)s)")
    p.add_argument("--keep", type=lambda text: text.split(","), default=[], metavar="COLUMN[,…]", help="columns of the data to keep")
    p.add_argument(
        "--max-rejected", type=share, default=0.01, metavar="SHARE", help="it stops where more rows cannot be scored (default: %(default)s)"
    )  # fmt: skip

    p = command(
        "health", health, "Show how the tasks of a run get on with each other: λ, gradients, calibration, gates. Also while it runs.",
        "distmtl health runs/synthetic",
    )  # fmt: skip
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--json", action="store_true", help="print the series as JSON instead")

    p = command(
        "verify", verify, "Prove on a few steps that sharded = unsharded, 1 = N workers and resumed = uninterrupted.",
        "distmtl verify configs/synthetic.yaml --workers 2",
    )  # fmt: skip
    config_arguments(p)
    p.add_argument("--workers", type=int, default=2, metavar="N", help="ranks compared with one (default: %(default)s)")

    p = command(
        "plan", plan, "Say where every table would lie on a cluster, whether it fits, and what a step would cost. Allocates nothing.",
        "distmtl plan configs/planning/ranking_1e12.yaml --world-size 64,128 --device cuda --hbm-gb 80",
    )  # fmt: skip
    config_arguments(p)
    p.add_argument(
        "--world-size", required=True, type=world_sizes, metavar="N[,M,…]",
        help="workers; of several the smallest that fits is shown in full, and the exit code is 1 if none does",
    )  # fmt: skip
    p.add_argument("--ranks-per-node", type=int, metavar="N", help="workers of a node (default: 8)")
    p.add_argument("--device", choices=["cuda", "cpu"], help="where tables live (default: the config's cluster.device, for auto cuda)")
    p.add_argument("--hbm-gb", type=float, metavar="GIB", help="memory of a CUDA device (default: 80)")
    p.add_argument("--ddr-gb", type=float, metavar="GIB", help="host memory per rank (default: 128)")
    p.add_argument("--intra-gb-s", type=float, metavar="GB/S", help="bandwidth within a node (default: 600, TorchRec's; of gloo on CPU 1)")
    p.add_argument("--inter-gb-s", type=float, metavar="GB/S", help="bandwidth between nodes (default: 12.5, TorchRec's; of gloo on CPU 1)")
    p.add_argument("--hbm-gb-s", type=float, metavar="GB/S", help="bandwidth of HBM (default, TorchRec's: 897)")
    p.add_argument("--ddr-gb-s", type=float, metavar="GB/S", help="bandwidth of host memory (default, TorchRec's: 51)")
    p.add_argument("--json", action="store_true", help="print JSON instead")
    p.add_argument("--measure", action="store_true", help="also train 20 steps with one worker here (CPU) and compare")

    p = command(
        "leaderboard", leaderboard, "Train heads × weightings × seeds, several at a time, and rank them. The same command continues.",
        "distmtl leaderboard configs/leaderboards/synthetic.yaml seeds=2",
    )  # fmt: skip
    config_arguments(p)

    p = command(
        "report", report, "Write one HTML file with plots of a run, or of several beside each other.",
        "distmtl report runs/quickstart --slices user_id,item_id",
    )  # fmt: skip
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, also of a followed run or one in progress")
    p.add_argument("--out", metavar="FILE", help="(default: RUN/report.html; of several runs, report.html in the working directory)")
    p.add_argument(
        "--rows", type=positive, default=50_000, metavar="N",
        help="of the test or validation split to examine the checkpoint on (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--slices", default="", metavar="FEATURE[,…]", help="metrics by how often training saw the ids of these features, as for evaluate"
    )
    p.add_argument("--no-model", action="store_true", help="without what asks the checkpoint: what the run's directory says, in seconds")

    p = command(
        "serve", serve, "Score candidates over HTTP, from one export or several side by side, on Ray Serve.",
        "distmtl serve exports/synthetic --port 8000",
    )  # fmt: skip
    p.add_argument("exports", nargs="+", metavar="[NAME=]EXPORT", help="an export, or a folder of published ones: its newest, as it grows")
    p.add_argument("--split", type=shares, metavar="P[,Q…]", help="share of the requests of each version (default: equal)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--replicas", type=positive, default=1, metavar="N", help="processes that score (default: %(default)s)")
    p.add_argument("--fusion", metavar="FILE", help="YAML with the formula of the fused score; read again when it changes")
    p.add_argument("--token-file", metavar="FILE", help="file with the bearer token that requests must have")
    p.add_argument("--max-candidates", type=positive, default=1024, metavar="N", help="of a request (default: %(default)s)")
    p.add_argument(
        "--max-list", type=positive, default=1024, metavar="N", help="elements of a list without max_length (default: %(default)s)"
    )
    p.add_argument("--max-body-kb", type=positive, default=1024, metavar="N", help="of a request (default: %(default)s)")
    p.add_argument(
        "--max-pending", type=positive, default=64, metavar="N", help="may wait in a replica, others get 503 (default: %(default)s)"
    )
    p.add_argument(
        "--batch-wait-ms", type=seconds, default=0.0, metavar="MS",
        help="wait so long for more requests to score together (default: 0, those that came meanwhile)",
    )  # fmt: skip
    p.add_argument("--poll-s", type=interval, default=2.0, metavar="S", help="between two looks for newer exports (default: %(default)s)")
    p.add_argument("--openapi", action="store_true", help="print the OpenAPI schema of the first export and end")

    p = command("config", show_config, "Print the resolved config.", "distmtl config configs/synthetic.yaml model.num_experts=8")
    config_arguments(p)

    command("doctor", doctor, "Say what would go wrong on this machine.", "distmtl doctor")
    return top


def config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="CONFIG", help="YAML file")
    p.add_argument("overrides", nargs="*", metavar="section.key=value")


def synth(a: argparse.Namespace) -> None:
    from distmtl.data.conflict import ConflictWorld
    from distmtl.data.drift import DriftWorld, write_partitions
    from distmtl.data.synthetic import Source, World, write_log
    from distmtl.data.wide import WideWorld

    sizes = {
        name: getattr(a, name) for name in ("users", "items", "domains", "confounding", "kept_negatives") if getattr(a, name) is not None
    }
    kinds = [k for k, asked in (("wide", a.wide), ("conflict", a.conflict is not None), ("drift", a.drift is not None)) if asked]
    if a.partitions is not None and kinds[:1] != ["drift"]:
        raise DistmtlError("--partitions says how many days a --drift log has; leave it out")
    if kinds and (others := [*kinds[1:], *sizes]):
        raise DistmtlError(f"--{others[0].replace('_', '-')} says nothing about a --{kinds[0]} log; leave one of them out")
    if a.drift is not None:
        rows = write_partitions(a.out, DriftWorld(a.seed, a.drift), partitions=14 if a.partitions is None else a.partitions, rows=a.rows)
        print(f"wrote {rows:,} rows to {a.out}; next: distmtl train {a.out}/mmoe.yaml --follow {a.out} --idle-timeout 5")
        return
    world: Source
    if a.conflict is not None:
        world = ConflictWorld(a.seed, a.conflict)
    else:
        world = WideWorld(a.seed) if a.wide else World(a.seed, **sizes)
    rows = write_log(a.out, world, rows=a.rows)
    print(f"wrote {rows:,} rows to {a.out}; next: distmtl train {a.out}/mmoe.yaml --workers 2")


def prepare(a: argparse.Namespace) -> None:
    from distmtl.data.prepare import prepare as run

    run(a.name, a.source, a.out, **dict(_option(o) for o in a.overrides))


def _option(text: str) -> tuple[str, str]:
    key, sep, value = text.partition("=")
    if not sep:
        raise DistmtlError(f"option {text!r} is not key=value")
    return key, value


def init(a: argparse.Namespace) -> None:
    from distmtl.data.init import Asked
    from distmtl.data.init import init as run

    draft = run(a.data, Asked(a.labels, a.group, a.time, a.weight, a.leave_out), a.out)
    wide = [max(len(row[i]) for row in draft.columns) for i in range(3)]
    for row in draft.columns:
        print("  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], wide)), row[3]]))
    print("".join(f"note: {notice}\n" for notice in draft.notices), end="")
    print(
        f"wrote {draft.config} ({', '.join(f'{split} {n:,}' for split, n in draft.rows.items())} rows); next: distmtl train {draft.config}"
    )


def train(a: argparse.Namespace) -> int:
    import signal
    from functools import partial

    from distmtl.config_file import load_config
    from distmtl.distributed.process import under_torchrun
    from distmtl.stopping import stop_on_signals
    from distmtl.storage import place

    config = load_config(a.config, [*a.overrides, *([f"cluster.workers={a.workers}"] if a.workers is not None else [])])
    run: Any
    if a.follow:
        run = partial(follow, a)
    elif a.partitions is not None or a.idle_timeout is not None:
        raise DistmtlError("--partitions and --idle-timeout end what --follow DIR begins; without it, train.epochs and train.steps do")
    elif a.publish or a.full_every is not None or a.quantize:
        raise DistmtlError(
            "--publish, --full-every and --quantize are about exports of what --follow DIR has trained; after a run without it, use "
            "distmtl export"
        )
    elif under_torchrun():
        from distmtl.loop import train as run
    else:
        from distmtl.cluster.trainer import train_on_ray as run
    with stop_on_signals(place(config.run_dir)) as request:
        result = run(config, a.resume, policy=a.resume_policy)
    if _first_rank():
        if result["metrics"]:
            print_metrics(result["metrics"])
        print(f"run directory: {result['run_dir']}")
        print(json.dumps(result))
    return 128 + signal.SIGINT if result["stopped"] and request.signal == signal.SIGINT else 0


def follow(a: argparse.Namespace, config: Any, resume: str, policy: Any) -> dict[str, Any]:
    from distmtl.distributed.process import process_group, under_torchrun
    from distmtl.following import Until
    from distmtl.following import follow as run

    until, publish = Until(a.partitions, a.idle_timeout), publisher(a)
    if not under_torchrun():
        from distmtl.cluster.trainer import follow_on_ray

        return follow_on_ray(config, a.follow, until, resume, policy, publish)
    from distmtl.loop import train as of_partition

    with process_group(config) as process:
        return run(config, a.follow, of_partition, until, resume=resume, policy=policy, publish=publish, process=process)


def publisher(a: argparse.Namespace) -> Any:
    """For `follow`, what exports every partition's checkpoint; None if that is not asked for."""
    if (a.full_every is not None or a.quantize) and not a.publish:
        raise DistmtlError("--full-every and --quantize are about the exports of --publish DIR; name it")
    if a.full_every is not None and a.full_every < 1:
        raise DistmtlError(f"--full-every {a.full_every}: every export is a full one with 1; give a number of at least 1")
    if not a.publish:
        return None
    from distmtl.distributed.process import quieten
    from distmtl.exporting.publishing import publish

    quieten()
    return lambda index, checkpoint: publish(checkpoint, a.publish, full_every=a.full_every or 24, row_format=a.quantize or "fp32")


def evaluate(a: argparse.Namespace) -> None:
    from distmtl.evaluation import evaluate as run
    from distmtl.run_directory import find_checkpoint, saved_calibrations

    if a.out and not a.out.absolute().parent.is_dir():
        raise DistmtlError(f"--out {a.out}: its folder does not exist")
    found = find_checkpoint(a.path)
    metrics = run(str(found.path), a.data, slices=_slices(a.slices))
    if _first_rank():
        print(f"checkpoint {found.path} (step {found.step})")
        for task, calibration in saved_calibrations(found).items():
            by = f" by {calibration['slices']}" if calibration["slices"] else ""
            print(f"task {task}: calibrated, {calibration['kind']}{by}")
        print_metrics(metrics)
        if a.out:
            a.out.write_text(json.dumps(metrics, indent=1) + "\n")
        print(json.dumps(metrics))


def export(a: argparse.Namespace) -> None:
    from distmtl.distributed.process import quieten
    from distmtl.exporting.writer import export as run
    from distmtl.serving.comparison import compare, costs, refuse_apart

    quieten()
    manifest = run(a.path, a.out, a.quantize or "fp32")
    size = sum(size for size, _ in manifest.files.values())
    print(f"export {a.out}: step {manifest.step:,} of {manifest.checkpoint}, {size / 2**20:,.1f} MiB, digest {manifest.digest}")
    if a.quantize or a.verify:
        comparisons = compare(a.path, a.out)
        for c in comparisons:
            print(c.text())
        if not a.quantize:
            refuse_apart(comparisons)
    for line in costs(a.path, a.out) if a.quantize else ():
        print(line)
    print(f"next: distmtl serve {a.out}")


def predict(a: argparse.Namespace) -> None:
    import signal

    from distmtl.distributed.process import quieten
    from distmtl.serving import batch

    def say(text: str) -> None:
        print(text, flush=True)

    def on_ray(job: batch.Job, parts: Sequence[batch.Part]) -> Generator[tuple[batch.Part, batch.Outcome], None, None]:
        from distmtl.cluster.predict import score_on_ray
        from distmtl.cluster.trainer import refuse_fleeting

        refuse_fleeting(a.out, "--out")
        return score_on_ray(job, parts, a.workers, say)

    quieten()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers too; whole parts stay
    job = batch.open_job(a.export, a.data, a.out, a.keep, a.max_rejected)
    print(json.dumps(batch.predict(job, on_ray if a.workers > 1 else batch.in_this_process, say)))


def health(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from distmtl.health_page import page, read_history

    history = read_history(a.run_dir)
    print(json.dumps(asdict(history)) if a.json else page(history))


def report(a: argparse.Namespace) -> None:
    from distmtl.distributed.process import quieten
    from distmtl.reporting.report import report as run

    quieten()
    print(f"report: {run(a.runs, a.out, a.rows, _slices(a.slices), model=not a.no_model)}")


def _slices(text: str) -> list[str]:
    return re.split(r",(?=[^\d])", text) if text else []


def print_metrics(metrics: dict[str, Any]) -> None:
    from distmtl.metrics import format_metrics

    print(format_metrics(metrics))


def verify(a: argparse.Namespace) -> int:
    from distmtl.config_file import load_config
    from distmtl.verification import verify as run

    if a.workers < 1:
        raise DistmtlError(f"--workers {a.workers}: compare with at least 1")
    failed = [c for c in run(load_config(a.config, a.overrides), a.workers) if not c.passed]
    print(f"{len(failed)} check(s) failed" if failed else "all checks passed")
    return len(failed) > 0


def workers(text: str) -> str:
    """A number of workers, or a range of them, as YAML."""
    numbers = text.split("-")
    if len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor MIN-MAX, such as 2-8")
    return numbers[0] if len(numbers) == 1 else f"{{min: {numbers[0]}, max: {numbers[1]}}}"


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return number


def world_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or numbers with commas between") from None


def plan(a: argparse.Namespace) -> int:
    from dataclasses import fields

    from distmtl.config_file import load_config
    from distmtl.planning import Hardware, make_report

    config = load_config(a.config, a.overrides)
    given = {f.name: getattr(a, f.name) for f in fields(Hardware) if getattr(a, f.name) is not None}
    device = given.pop("device", "cpu" if config.cluster.device == "cpu" else "cuda")
    report = make_report(config, Hardware.of(device, **given), a.world_size, a.measure)
    print(json.dumps(report.json()) if a.json else report.text())
    return 0 if report.fits else 1


def leaderboard(a: argparse.Namespace) -> int:
    import signal

    from distmtl.cluster.leaderboard import run_leaderboard
    from distmtl.leaderboard import load_leaderboard

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs' processes too; each has its last checkpoint
    table = run_leaderboard(load_leaderboard(a.config, a.overrides), say=lambda text: print(text, flush=True))
    print(f"\n{table.text()}")
    return 0 if all(table.chosen(data) for data in table.rows) else 1


def serve(a: argparse.Namespace) -> None:
    from distmtl.serving.app import Settings
    from distmtl.serving.following import described
    from distmtl.serving.request import Limits

    versions: dict[str, str] = {}
    for text in a.exports:
        name, sign, path = text.partition("=")
        name, path = (name, path) if sign and not Path(text).exists() else (Path(text).resolve().name, text)
        if name in versions:
            raise DistmtlError(f"two exports are called {name!r}; name them: {name}1={versions[name]} {name}2={path}")
        versions[name] = path
    limits = Limits(candidates=a.max_candidates, list=a.max_list, body_kb=a.max_body_kb)
    if a.openapi:
        print(json.dumps(described(Path(next(iter(versions.values()))), limits), indent=1))
        return
    split = a.split or (1 / len(versions),) * len(versions)
    if len(split) != len(versions):
        raise DistmtlError(f"--split has {len(split)} shares for {len(versions)} version(s); give one each")
    settings = Settings(
        versions,
        tuple(share / sum(split) for share in split),
        fusion=a.fusion,
        token=a.token_file,
        limits=limits,
        pending=a.max_pending,
        wait_ms=a.batch_wait_ms,
        poll_s=a.poll_s,
    )
    from distmtl.cluster.serve import serve as run

    if a.host not in ("127.0.0.1", "localhost", "::1") and not a.token_file:
        print(f"whoever reaches {a.host}:{a.port} may ask: there is no --token-file", file=sys.stderr)
    run(settings, a.host, a.port, a.replicas, say=lambda text: print(text, flush=True))


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def interval(text: str) -> float:
    if not (number := seconds(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number


def shares(text: str) -> tuple[float, ...]:
    try:
        out = tuple(float(part) for part in text.split(","))
    except ValueError:
        out = ()
    if not out or not all(0 <= share < float("inf") for share in out) or not sum(out):
        raise argparse.ArgumentTypeError(f"{text!r} is not shares with commas between, such as 0.9,0.1")
    return out


def show_config(a: argparse.Namespace) -> None:
    from distmtl.config_file import dump_config, load_config

    print(dump_config(load_config(a.config, a.overrides)), end="")


def doctor(a: argparse.Namespace) -> int:
    from distmtl.doctor import run_doctor

    return run_doctor()


def _first_rank() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
