"""`distmtl train`."""

from __future__ import annotations

import argparse
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

from distmtl.commands.arguments import config_arguments, first_rank, positive, print_metrics, seconds
from distmtl.errors import DistmtlError

HELP = "Train: on Ray Train workers, or as one rank under torchrun."
EXAMPLE = "distmtl train configs/synthetic.yaml train.epochs=2 --workers 2"


def add(p: argparse.ArgumentParser) -> None:
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


def run(a: argparse.Namespace) -> int:
    from distmtl.config_file import load_config
    from distmtl.distributed.process import under_torchrun
    from distmtl.stopping import stop_on_signals
    from distmtl.storage import place

    config = load_config(a.config, [*a.overrides, *([f"cluster.workers={a.workers}"] if a.workers is not None else [])])
    train: Any
    if a.follow:
        train = partial(follow, a)
    elif a.partitions is not None or a.idle_timeout is not None:
        raise DistmtlError("--partitions and --idle-timeout end what --follow DIR begins; without it, train.epochs and train.steps do")
    elif a.publish or a.full_every is not None or a.quantize:
        raise DistmtlError(
            "--publish, --full-every and --quantize are about exports of what --follow DIR has trained; after a run without it, use "
            "distmtl export"
        )
    elif under_torchrun():
        from distmtl.loop import train
    else:
        from distmtl.cluster.trainer import train_on_ray as train
    with stop_on_signals(place(config.run_dir)) as request:
        result = train(config, a.resume, policy=a.resume_policy)
    if first_rank():
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


def workers(text: str) -> str:
    """A number of workers, or a range of them, as YAML."""
    numbers = text.split("-")
    if len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor MIN-MAX, such as 2-8")
    return numbers[0] if len(numbers) == 1 else f"{{min: {numbers[0]}, max: {numbers[1]}}}"
