"""The service without Ray and without a socket: a request's method, path, headers and body → its answer."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import shlex
import sys
import threading
import time
import traceback
from bisect import bisect
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from distmtl.config import Config
from distmtl.distributed.matmul import fastest_fp32
from distmtl.errors import DistmtlError
from distmtl.exporting import manifest
from distmtl.serving.counters import CONTENT_TYPE, Counters
from distmtl.serving.following import Followed, Version, chains, described
from distmtl.serving.fusion import AnyFusion, ProductFusion, check_fusion, fuse, parse_fusion, read_fusion
from distmtl.serving.openapi import JSON
from distmtl.serving.request import BadRequest, Limits, parse_body, parse_rows
from distmtl.serving.scorer import Scorer

ROUTES = {
    "/v1/score": "POST",
    "/v1/health": "GET",
    "/v1/ready": "GET",
    "/v1/model": "GET",
    "/openapi.json": "GET",
    "/metrics": "GET",
}
OPEN = ("/v1/health", "/v1/ready")  # without a token
SPLIT_KEY = "x-split-key"
LEAST_POLL_S = 0.02


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Args:
        versions: name → export or folder of published ones.
        split: share of the requests of each version, in the same order; adds up to 1.
        fusion: file with the formula; where there is none, fusion.default_fusion.
        token: file with the bearer token; where there is none, everybody may ask.
        pending: requests of a process that may wait for their scores; more are told to come again.
        batch: candidates that are scored together.
        wait_ms: how long a batch waits for more.
        poll_s: seconds between two looks for newer exports and another fusion.
    """

    versions: dict[str, str]
    split: tuple[float, ...]
    fusion: str | None = None
    token: str | None = None
    limits: Limits = field(default_factory=Limits)
    pending: int = 64
    batch: int = 2048
    wait_ms: float = 0.0
    poll_s: float = 2.0

    def absolute(self) -> Settings:
        """The same for a process in another working directory. Links stay links: where they lead may change while it serves."""
        versions = {name: os.path.abspath(path) for name, path in self.versions.items()}
        fusion, token = (path and os.path.abspath(path) for path in (self.fusion, self.token))
        return replace(self, versions=versions, fusion=fusion, token=token)

    def request(self, url: str) -> str:
        """A command that sends one request: the example in the OpenAPI document of the first version."""
        name, path = next(iter(self.versions.items()))
        body = described(Path(path), self.limits)["paths"]["/v1/score"]["post"]["requestBody"]["content"][JSON]["example"]
        fusion = read_fusion(Path(self.fusion)) if self.fusion else None
        if isinstance(fusion, ProductFusion) and fusion.price and fusion.price not in body["context"]:
            candidates = body["candidates"]
            if not all(isinstance(v, int | float) and v > 0 for v in candidates.get(fusion.price, [0])):
                candidates[fusion.price] = [i + 1 for i, _ in enumerate(next(iter(candidates.values())))]
        if len(self.versions) > 1:
            body["version"] = name
        token = f' -H "Authorization: Bearer $(cat {shlex.quote(self.token)})"' if self.token else ""
        return f"curl -s {url}/v1/score{token} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"

    def check(self) -> None:
        """What can be seen without loading a model.

        Raises:
            DistmtlError: an export, the fusion or the token cannot be read.
        """
        for path in self.versions.values():
            manifest.read(chains(Path(path))[0][0])
        if self.fusion:
            read_fusion(Path(self.fusion))
        _token(self.token)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = JSON

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> Answer:
        return cls(status, json.dumps(content).encode(), headers)


class Service:
    """
    Raises:
        DistmtlError: an export, the fusion or the token cannot be read.
    """

    def __init__(self, settings: Settings):
        fastest_fp32()
        self.settings = settings
        self.token = _token(settings.token)
        self.scorer = Scorer(settings.batch, settings.wait_ms / 1000)
        self.counters = Counters()
        self.fusion: Followed[AnyFusion] | None = None
        self.versions = {
            name: Version(name, Path(path), settings.limits, self.scorer.between, self._check) for name, path in settings.versions.items()
        }
        if settings.fusion:
            self.fusion = Followed(Path(settings.fusion), self._read_fusion)
        for version in self.versions.values():
            self.counters.model(version.name, version.manifest)
            if version.failure:
                self._failed(version.name, version.failure)
        self.stopping = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self.watcher.start()

    def stop(self) -> None:
        """After all that waits is answered."""
        self.stopping.set()
        self.watcher.join()
        self.scorer.stop()

    async def answer(
        self, method: str, path: str, headers: Mapping[str, str], query: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> Answer:
        """Never raises. Header names in lower case."""
        try:
            answer = await self._answer(method, path, headers, query, body)
        except BadRequest as e:
            answer = Answer.of({"error": str(e)}, e.status)
        except DistmtlError as e:  # a value that the model does not take
            answer = Answer.of({"error": str(e)}, 422)
        except Exception:
            traceback.print_exc()
            answer = Answer.of({"error": "the server failed; its log says how"}, 500)
        if path not in OPEN:
            self.counters.requests.labels(str(answer.status)).inc()
        return answer

    async def _answer(
        self, method: str, path: str, headers: Mapping[str, str], query: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> Answer:
        if path not in ROUTES:
            return Answer.of({"error": f"there is no {path}; there are {', '.join(ROUTES)}"}, 404)
        if method != ROUTES[path]:
            return Answer.of({"error": f"{path} takes {ROUTES[path]}, not {method}"}, 405, allow=ROUTES[path])
        if path not in OPEN and not self._allowed(headers.get("authorization", "")):
            return Answer.of({"error": "this needs the header Authorization: Bearer TOKEN"}, 401, **{"www-authenticate": "Bearer"})
        match path:
            case "/v1/score":
                return await self._score(headers, body)
            case "/v1/health":
                return Answer.of({"status": "alive"})
            case "/v1/ready":
                return Answer.of({"status": "ready"})
            case "/v1/model":
                return Answer.of({"versions": [self._described(v, share) for v, share in self._shares()]})
            case "/openapi.json":
                return Answer.of(self._named(query.get("version") or next(iter(self.versions))).model.openapi())
        return Answer(200, self.counters.text(), kind=CONTENT_TYPE)

    def _allowed(self, given: str) -> bool:
        return self.token is None or hmac.compare_digest(given.encode(), b"Bearer " + self.token)

    async def _score(self, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> Answer:
        began = time.perf_counter()
        whole = await _read(body, headers.get("content-length", ""), self.settings.limits)
        if self.scorer.waiting >= self.settings.pending:
            return Answer.of({"error": f"{self.scorer.waiting} requests wait already; come again"}, 503, **{"retry-after": "1"})
        raw = parse_body(whole)
        version = self._chosen(raw, headers)
        model = version.model
        if raw.get("fusion") is not None:
            fusion = parse_fusion(raw["fusion"])
            check_fusion(fusion, model.predictor.config)
        else:
            fusion = self.fusion.value if self.fusion else model.fusion
        request = parse_rows(raw, model.columns, fusion, self.settings.limits)
        scored, digest = await self.scorer.score(model.predictor, request.table)
        _refuse_infinite(scored.predictions)
        with np.errstate(all="ignore"):
            fused = np.nan_to_num(fuse(fusion, scored.predictions, request.price), nan=0.0)
        order = np.argsort(-fused, kind="stable")
        scores = {task: np.ascontiguousarray(p) for task, p in scored.predictions.items()}
        content = {"version": version.name, "digest": digest, "scores": scores, "fused": fused, "order": order}
        self.counters.scored(version.name, scored)
        self.counters.seconds.labels(version.name).observe(time.perf_counter() - began)
        return Answer(200, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), {"x-version": version.name, "x-digest": digest})

    def _chosen(self, raw: dict[str, Any], headers: Mapping[str, str]) -> Version:
        """The version that the request names, else the one that the split gives its key, else any by the split."""
        if raw.get("version") is not None:
            return self._named(raw["version"])
        if len(self.versions) == 1:
            return next(iter(self.versions.values()))
        if key := headers.get(SPLIT_KEY):
            at = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
        else:
            at = random.random()
        ends = list(accumulate(self.settings.split))
        return list(self.versions.values())[min(bisect(ends, at), len(ends) - 1)]

    def _shares(self) -> list[tuple[Version, float]]:
        return list(zip(self.versions.values(), self.settings.split, strict=True))

    def _named(self, name: Any) -> Version:
        if not isinstance(name, str) or name not in self.versions:
            raise BadRequest(422, f"there is no version {str(name)[:80]!r}; there are {', '.join(self.versions)}")
        return self.versions[name]

    def _described(self, version: Version, share: float) -> dict[str, Any]:
        m, model = version.manifest, version.model
        fusion = self.fusion.value if self.fusion else model.fusion
        return {
            "version": version.name,
            "digest": m.digest,
            "share": share,
            "name": m.name,
            "checkpoint": m.checkpoint,
            "step": m.step,
            "sequence": m.sequence,
            "loaded": version.since,
            "reload_failure": version.failure or None,
            "tasks": {t.name: t.kind for t in model.predictor.config.tasks},
            "columns": m.columns,
            "row_format": m.row_format,
            "fusion": fusion.model_dump(mode="json"),
            "card": version.card(),
        }

    def _read_fusion(self, path: Path) -> AnyFusion:
        fusion = read_fusion(path)
        for version in self.versions.values():
            check_fusion(fusion, version.model.predictor.config)
        return fusion

    def _check(self, config: Config) -> None:
        """Of a newer export, before it is served."""
        if self.fusion:
            check_fusion(self.fusion.value, config)

    def _watch(self) -> None:
        while not self.stopping.wait(max(self.settings.poll_s, LEAST_POLL_S)):
            for version in self.versions.values():
                self._tried(version.name, partial(version.refresh, partial(self._took, version)))
            if self.fusion:
                self._tried("fusion", self.fusion.refresh)

    def _took(self, version: Version, kind: str) -> None:
        self.counters.reloads.labels(version.name, kind).inc()
        self.counters.model(version.name, version.manifest)
        _say(f"version {version.name}: {kind} taken, now {version.manifest.digest}, step {version.manifest.step:,}")

    def _tried(self, what: str, refresh: Any) -> None:
        try:
            refresh()
        except Exception as e:
            if not isinstance(e, DistmtlError):
                traceback.print_exc()
            self._failed(what, str(e))

    def _failed(self, what: str, why: str) -> None:
        self.counters.failures.labels(what).inc()
        _say(f"{what}: the newest is not served: {why}")


async def _read(body: AsyncIterator[bytes], length: str, limits: Limits) -> bytes:
    """
    Raises:
        BadRequest: it is longer than it may be; the rest is not read.
    """
    most, parts, got = limits.body_kb * 1024, [], 0
    if not (length.isdecimal() and int(length[:20]) > most):
        async for part in body:
            parts.append(part)
            got += len(part)
            if got > most:
                break
        else:
            return b"".join(parts)
    raise BadRequest(413, f"the body has more than {limits.body_kb} kB; send fewer candidates at once")


def _refuse_infinite(predictions: dict[str, np.ndarray]) -> None:
    """
    Raises:
        BadRequest: a number of the request is so large that the model overflows.
    """
    for task, p in predictions.items():
        if not np.isfinite(p).all():
            i = int(np.flatnonzero(~np.isfinite(p).reshape(len(p), -1).all(1))[0])
            raise BadRequest(422, f"task {task} of candidate {i} is not finite: its numbers are too large for the model")


def _token(file: str | None) -> bytes | None:
    if file is None:
        return None
    try:
        token = Path(file).read_bytes().strip()
    except OSError as e:
        raise DistmtlError(f"--token-file {file} cannot be read: {e.strerror}") from None
    if not token:
        raise DistmtlError(f"--token-file {file} is empty; write the token into it")
    return token


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
