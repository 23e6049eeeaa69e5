"""`distmtl serve` as users run it, over HTTP: scores are Predictor's, newer exports are taken, it stops without dropping a request."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import served
from bodies import check_any
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from distmtl import Predictor
from distmtl.serving.comparison import checkpoint_predictions

TABLE = served.rows(30)
EXAMPLES = 5000  # two bodies each


def ask(port: int, method: str, path: str, content=None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, content if isinstance(content, bytes | None) else json.dumps(content).encode(), headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


@contextmanager
def serving(*arguments: str):
    """Its process and port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "distmtl", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": "local"}
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), (line, process.communicate())
        yield process, port
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(600)
def test_serve(tiny_data, tmp_path):
    first, last = served.published(tiny_data, tmp_path)
    exports, at = tmp_path / "all", tmp_path / "at"
    (tmp_path / "token").write_text("secret")
    at.mkdir()
    shutil.copytree(exports / "000000-full", at / "000000-full")
    allowed = {"Authorization": "Bearer secret"}
    expected = Predictor(exports / "000000-full")(TABLE)
    options = ["--split", "1,0", "--token-file", str(tmp_path / "token"), "--max-body-kb", "64", "--poll-s", "0.2"]
    with serving(f"a={at}", f"b={exports}", *options) as (process, port):
        status, body = ask(port, "POST", "/v1/score", served.body(TABLE), **allowed)
        assert status == 200, body
        got = json.loads(body)
        assert got["version"] == "a"
        before = got["digest"]
        for task, values in checkpoint_predictions(first, TABLE).items():
            np.testing.assert_allclose(got["scores"][task], values, atol=1e-5)
            np.testing.assert_array_equal(np.float32(got["scores"][task]), expected[task])
        got = json.loads(ask(port, "POST", "/v1/score", served.body(TABLE, version="b"), **allowed)[1])
        for task, values in checkpoint_predictions(last, TABLE).items():
            np.testing.assert_allclose(got["scores"][task], values, atol=1e-5)

        for status, *request in (
            (401, "POST", "/v1/score", served.body(TABLE)),
            (400, "POST", "/v1/score", b"{"),
            (413, "POST", "/v1/score", b" " * 70_000),
            (404, "GET", "/v2"),
            (405, "GET", "/v1/score"),
            (200, "GET", "/v1/health"),
            (200, "GET", "/v1/ready"),
            (200, "GET", "/v1/model"),
            (200, "GET", "/openapi.json"),
        ):
            got = ask(port, *request, **(allowed if status != 401 else {}))
            assert got[0] == status and isinstance(json.loads(got[1]), dict), got

        shutil.copytree(exports / "000001-delta", tmp_path / "partial")
        (tmp_path / "partial").rename(at / "000001-delta")
        until = time.monotonic() + 60
        while json.loads(ask(port, "POST", "/v1/score", served.body(TABLE), **allowed)[1])["digest"] == before:
            assert time.monotonic() < until
        text = ask(port, "GET", "/metrics", **allowed)[1].decode()
        assert 'distmtl_reloads_total{kind="delta",version="a"} 1.0' in text and 'distmtl_requests_total{status="413"} 1.0' in text

        answers: list[int] = []

        def until_refused() -> None:
            while True:
                try:
                    answers.append(ask(port, "POST", "/v1/score", served.body(TABLE), **allowed)[0])
                except (OSError, http.client.HTTPException):
                    return

        client = threading.Thread(target=until_refused)
        client.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        client.join()
        assert process.returncode == 0 and "stopping" in out, err
        assert "Traceback" not in err and answers.count(200) > 0 and set(answers) <= {200, 404, 503}


def test_the_readmes_road_to_a_score(tmp_path):
    """Its commands, after a small run in the quickstart's place."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    block = text.split("## From the log to a score over HTTP")[1].split("\n\n")[1]
    quickstart, export, serve, *curl = [line.removeprefix("    ") for line in block.splitlines()]
    assert quickstart == "make quickstart"
    run = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    distmtl = [sys.executable, "-m", "distmtl"]
    run([*distmtl, "synth", "--out", "data/synthetic", "--rows", "20000"])
    limits = ["train.steps=5", "run.dir=runs/quickstart"]
    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "distmtl", "train", "data/synthetic/mmoe.yaml", *limits])
    run([*distmtl, *shlex.split(export)[1:]])
    with serving(str(tmp_path / shlex.split(serve)[2])) as (_, port):
        answer = json.loads(run(shlex.split("\n".join(curl).replace("localhost:8000", f"127.0.0.1:{port}"))).stdout)
    assert set(answer["scores"]) == {"click", "conversion"} and sorted(answer["order"]) == [0, 1, 2]
    assert answer["fused"] == pytest.approx(np.prod([*answer["scores"].values()], axis=0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_bodies_of_any_kind(tiny_data, tmp_path):
    served.published(tiny_data, tmp_path)
    with serving(f"v={tmp_path / 'all'}", "--max-candidates", "40", "--max-list", "8", "--max-body-kb", "64") as (_, port):
        document = json.loads(ask(port, "GET", "/openapi.json")[1])

        def answer(content):
            status, got = ask(port, "POST", "/v1/score", content)
            return status, json.loads(got)

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def run(data):
            check_any(data, document, answer)

        run()
        assert ask(port, "GET", "/v1/health")[0] == 200


def test_wrong_commands(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, sentence in (
        ([str(tmp_path / "empty")], "neither an export nor a folder"),
        (["a=x", "a=y"], "two exports are called 'a'"),
        (["x", "y", "--split", "1"], "--split has 1 shares for 2"),
        (["x", "--split", "a"], "is not shares"),
        (["x", "--replicas", "0"], "is not a number above 0"),
    ):
        done = subprocess.run([sys.executable, "-m", "distmtl", "serve", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_port_that_cannot_be():
    from distmtl.cluster.serve import _refuse_taken
    from distmtl.errors import DistmtlError

    with pytest.raises(DistmtlError, match=r"--port 99999 cannot be opened: .*0-65535"):
        _refuse_taken("127.0.0.1", 99999)


def test_a_client_that_goes_away_is_no_failure_of_the_server():
    from distmtl.cluster.serve import body_of
    from distmtl.serving.request import BadRequest

    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def read() -> list[bytes]:
        return [part async for part in body_of(Request({"type": "http", "method": "POST", "headers": []}, receive))]

    with pytest.raises(BadRequest, match="went away"):
        asyncio.run(read())
