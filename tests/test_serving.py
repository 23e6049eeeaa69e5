"""The service without Ray: scores, versions, reload under load, limits, and bodies of any kind."""

from __future__ import annotations

import asyncio
import copy
import json
import shlex
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import served
from bodies import check_any
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distmtl import Predictor
from distmtl.errors import DistmtlError
from distmtl.exporting import manifest
from distmtl.serving.app import Service, Settings
from distmtl.serving.following import Version, described
from distmtl.serving.request import Limits

LIMITS = Limits(candidates=40, list=8, body_kb=16)


@pytest.fixture(scope="module")
def exports(tiny_data, tmp_path_factory) -> Path:
    """000000-full and 000001-delta of a run."""
    folder = tmp_path_factory.mktemp("exports")
    served.published(tiny_data, folder)
    return folder / "all"


@pytest.fixture
def serve():
    """Services that end with the test."""
    started = []

    def start(*paths: Path, **more) -> Service:
        split = more.pop("split", (1 / len(paths),) * len(paths))
        versions = {f"v{i}": str(path) for i, path in enumerate(paths)}
        started.append(Service(Settings(versions, split, **{"limits": LIMITS, "poll_s": 0.05} | more)))
        return started[-1]

    yield start
    for service in started:
        service.stop()


def predicted(folder: Path, table: pa.Table, deltas: tuple[Path, ...] = ()) -> dict[str, np.ndarray]:
    predictor = Predictor(folder)
    for delta in deltas:
        predictor.apply(delta)
    return predictor(table)


def test_scores_fusion_and_order(exports, serve):
    """Those of the Predictor; of equal candidates the first comes first."""
    service, table = serve(exports), served.rows(20)
    table = pa.concat_tables([table, table.slice(3, 1)]).combine_chunks()
    expected = predicted(exports / "000000-full", table, (exports / "000001-delta",))
    status, got = served.answer(service, served.body(table))
    assert status == 200 and set(got["scores"]) == {"click", "conversion", "rating"}
    for task, values in got["scores"].items():
        np.testing.assert_array_equal(np.float32(values), expected[task])
    product = expected["click"].astype(float) * expected["conversion"].astype(float)
    np.testing.assert_allclose(got["fused"], product, rtol=1e-12)
    assert got["order"] == sorted(range(21), key=lambda i: (-got["fused"][i], i)) and got["order"].index(3) + 1 == got["order"].index(20)

    own = {"tasks": {"click": {"alpha": 0.1, "beta": 2}}, "price": "price", "gamma": 0.5}
    body = served.body(table, fusion=own)
    body["candidates"]["price"] = list(range(1, 22))
    _, got = served.answer(service, body)
    np.testing.assert_allclose(got["fused"], (0.1 + expected["click"].astype(float)) ** 2 * np.arange(1, 22) ** 0.5, rtol=1e-12)
    none = {"context": body["context"], "candidates": {name: [] for name in served.CANDIDATES}}
    assert served.answer(service, none)[1]["order"] == []


def test_refusals_and_routes(exports, serve, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    service, body = serve(exports, token=str(tmp_path / "token")), served.body(served.rows(3))
    allowed = {"authorization": "Bearer secret"}
    ask = lambda content=b"", **more: served.answer(service, content, **more)[0]  # noqa: E731
    assert ask(body) == ask(body, headers={"authorization": "Bearer other"}) == ask(path="/v1/model", method="GET") == 401
    assert ask(body, headers=allowed) == ask(path="/v1/health", method="GET") == ask(path="/v1/ready", method="GET") == 200
    assert ask(path="/v1/nothing") == 404 and ask(path="/v1/score", method="GET") == 405
    assert ask(b" " * 17_000, headers=allowed) == ask(b"", headers=allowed | {"content-length": "9" * 30}) == 413
    assert ask(b" " * 15_000, headers=allowed) == 400
    assert ask({**body, "version": "other"}, headers=allowed) == 422
    huge = copy.deepcopy(body)
    huge["context"]["x"] = 3e38
    status, got = served.answer(service, huge, headers=allowed)
    assert status == 200 or "too large for the model" in got["error"]
    status, got = served.answer(service, path="/v1/model", method="GET", headers=allowed)
    assert got["versions"][0]["sequence"] == 1 and got["versions"][0]["card"].startswith("# tiny")
    (tmp_path / "token").write_text(" ")
    with pytest.raises(DistmtlError, match="is empty"):
        Settings({"a": str(exports)}, (1,), token=str(tmp_path / "token")).check()


def test_too_many_wait(exports, serve):
    service, body = serve(exports, pending=3), served.body(served.rows(2))
    release = threading.Event()
    blocker = threading.Thread(target=service.scorer.between, args=(release.wait,))
    blocker.start()

    async def crowd():
        asked = [asyncio.create_task(served.ask(service, body)) for _ in range(5)]
        await asyncio.sleep(0.2)
        health = await served.ask(service, b"", path="/v1/health", method="GET")
        release.set()
        return [a.status for a in await asyncio.gather(*asked)], health.status

    statuses, health = asyncio.run(crowd())
    blocker.join()
    assert sorted(statuses) == [200] * 3 + [503] * 2 and health == 200


def test_one_wrong_request_of_a_batch(exports, serve):
    """Only it is told; the others get what they get alone. What the checks of requests let through is refused by the model."""
    service, table = serve(exports), served.rows(6)
    predictor = service.versions["v0"].model.predictor
    wrong = table.set_column(table.column_names.index("user"), "user", pa.array([1, 2, 3, 999, 4, 5]))
    release, calls, score = threading.Event(), [], predictor.score
    predictor.score = lambda table: (calls.append(table.num_rows), score(table))[1]
    blocker = threading.Thread(target=service.scorer.between, args=(release.wait,))
    blocker.start()

    async def together():
        asked = [asyncio.ensure_future(service.scorer.score(predictor, t)) for t in (table, wrong, table.slice(2))]
        await asyncio.sleep(0.1)
        release.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, refused, last = asyncio.run(together())
    blocker.join()
    assert calls == [16, 6, 6, 4] and "id 999 at row 3" in str(refused)
    np.testing.assert_allclose(last[0].predictions["click"], first[0].predictions["click"][2:], atol=1e-7)


def test_split(exports, serve):
    """By key: always the same version, in the shares that were asked for."""
    service, body = serve(exports, exports / "000000-full", split=(0.8, 0.2)), served.body(served.rows(1))

    async def versions(headers):
        return [(await served.ask(service, body, headers=h)).headers["x-version"] for h in headers]

    keys = [{"x-split-key": f"user {i}"} for i in range(200)]
    chosen = asyncio.run(versions(keys))
    assert chosen == asyncio.run(versions(keys)) and 20 <= chosen.count("v1") <= 62
    assert set(asyncio.run(versions([{}] * 60))) == {"v0", "v1"}
    digests = {served.answer(service, {**body, "version": v})[1]["digest"] for v in ("v0", "v1")}
    assert len(digests) == 2


def test_reload_under_load(exports, serve, tmp_path):
    """A full export, its delta, a broken one, another full one: every request is answered, by one of the models as it is whole."""
    (tmp_path / "at").mkdir()
    shutil.copytree(exports / "000000-full", tmp_path / "at" / "000000-full")
    service, table = serve(tmp_path / "at"), served.rows(5)
    whole = [predicted(exports / "000000-full", table), predicted(exports / "000000-full", table, (exports / "000001-delta",))]
    assert not np.array_equal(whole[0]["click"], whole[1]["click"])
    digests, seen = {service.versions["v0"].manifest.digest: 0}, set()
    version, body = service.versions["v0"], served.body(table)

    def publish(name: str, source: Path, broken: bool = False) -> None:
        shutil.copytree(source, tmp_path / "partial")
        if broken:
            file = next((tmp_path / "partial" / "tables").rglob("*.safetensors"))
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        (tmp_path / "partial").rename(tmp_path / "at" / name)

    async def until(done):
        for _ in range(2000):
            for answer in await asyncio.gather(*(served.ask(service, body) for _ in range(4))):
                assert answer.status == 200
                got = json.loads(answer.body)
                expected = whole[digests.setdefault(got["digest"], 1)]
                seen.add(got["digest"])
                for task, values in got["scores"].items():
                    np.testing.assert_allclose(values, expected[task], atol=1e-6)
            if done():
                return
        raise AssertionError("not reloaded")

    async def everything():
        await until(lambda: True)
        publish("000001-delta", exports / "000001-delta")
        await until(lambda: version.manifest.sequence == 1)
        publish("000002-full", exports / "000000-full", broken=True)
        await until(lambda: version.failure)
        assert "other bytes" in version.failure and version.manifest.sequence == 1
        digests[version.manifest.digest] = 1
        publish("000003-full", exports / "000000-full")
        await until(lambda: version.manifest.sequence == 0)
        await until(lambda: True)

    asyncio.run(everything())
    assert len(seen) == 2 and not version.failure
    text = served.answer(service, b"", path="/v1/model", method="GET") and service.counters.text().decode()
    assert 'distmtl_reloads_total{kind="delta",version="v0"} 1.0' in text
    assert 'distmtl_reloads_total{kind="full",version="v0"} 1.0' in text
    assert 'distmtl_reload_failures_total{what="v0"} 1.0' in text


def test_starting_beside_a_broken_export(exports, serve, tmp_path):
    """A replica that starts anew serves what came before it."""
    shutil.copytree(exports, tmp_path / "at")
    shutil.copytree(exports / "000000-full", tmp_path / "at" / "000002-full")
    (tmp_path / "at" / "000002-full" / "model.pt2").write_bytes(b"?")
    version = serve(tmp_path / "at").versions["v0"]
    assert version.manifest.sequence == 1 and "model.pt2" in version.failure
    shutil.copy(exports / "000000-full" / "model.pt2", tmp_path / "at" / "000002-full")  # the rest of it: `cp -r` writes the manifest early
    until = time.monotonic() + 60
    while version.failure and time.monotonic() < until:
        time.sleep(0.05)
    assert version.manifest.sequence == 0 and not version.failure


def test_what_is_whole_is_taken(exports, tmp_path):
    """Deltas up to a broken one; a single export that is replaced by another."""
    took: list[str] = []
    (tmp_path / "at").mkdir()
    shutil.copytree(exports / "000000-full", tmp_path / "at" / "000000-full")
    version = Version("v", tmp_path / "at", LIMITS, lambda run: run(), lambda config: None)
    for number in (1, 2):
        shutil.copytree(exports / "000001-delta", tmp_path / "at" / f"{number:06d}-delta")
    with pytest.raises(DistmtlError, match="000002-delta changes export"):
        version.refresh(took.append)
    assert took == ["delta"] and version.manifest.sequence == 1 and "000002" in version.failure
    version.refresh(took.append)
    assert took == ["delta"], "told once"

    version = Version("v", tmp_path / "at" / "000000-full", LIMITS, lambda run: run(), lambda config: None)
    shutil.copytree(exports / "000000-full", tmp_path / "other")
    other = manifest.complete(tmp_path / "other", version.manifest.model_copy(update={"name": "other"}))
    (tmp_path / "at" / "000000-full").rename(tmp_path / "former")
    (tmp_path / "other").rename(tmp_path / "at" / "000000-full")
    version.refresh(took.append)
    assert took == ["delta", "full"] and version.manifest.digest == other.digest


def test_a_link_that_is_moved_and_moved_back(exports, tmp_path, monkeypatch):
    """How an operator rolls back: the server keeps the link, not what it led to at the start."""
    shutil.copytree(exports / "000000-full", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "live").symlink_to(exports / "000000-full")
    settings = Settings({"live": "live"}, (1.0,), fusion="live/fusion.yaml").absolute()
    assert settings.versions == {"live": str(tmp_path / "live")} and settings.fusion == str(tmp_path / "live" / "fusion.yaml")
    version = Version("live", Path(settings.versions["live"]), LIMITS, lambda run: run(), lambda config: None)
    first = version.manifest
    second = manifest.complete(tmp_path / "b", first.model_copy(update={"name": "b"}))
    for to, digest in ((tmp_path / "b", second.digest), (exports / "000000-full", first.digest)):
        (tmp_path / "live").unlink()
        (tmp_path / "live").symlink_to(to)
        version.refresh(lambda kind: None)
        assert version.manifest.digest == digest


def test_fusion_file(exports, serve, tmp_path):
    file, body = tmp_path / "fusion.yaml", served.body(served.rows(4))
    file.write_text("fusion: {kind: linear, tasks: {click: 1.0}}\n")
    service = serve(exports, fusion=str(file))
    got = served.answer(service, body)[1]
    np.testing.assert_allclose(got["fused"], got["scores"]["click"], rtol=1e-6)

    def changed(text: str, key: str) -> dict:
        file.write_text(text)
        for _ in range(100):
            threading.Event().wait(0.05)
            if key in service.counters.text().decode():
                return served.answer(service, body)[1]
            if (got := served.answer(service, body)[1])["fused"][0] == pytest.approx(2 * got["scores"]["click"][0], rel=1e-6):
                return got
        raise AssertionError("not read again")

    changed("fusion: {kind: linear, tasks: {click: 2.0}}\n", "nothing")
    got = changed("fusion: {kind: linear, tasks: {clack: 2.0}}\n", 'failures_total{what="fusion"} 1.0')
    np.testing.assert_allclose(got["fused"], 2 * np.array(got["scores"]["click"]), rtol=1e-6)


def test_metrics(exports, serve):
    service, table = serve(exports), served.rows(30, seed=2)
    got = served.answer(service, served.body(table))[1]
    served.answer(service, b"?")
    lines = dict(line.rsplit(" ", 1) for line in service.counters.text().decode().splitlines() if not line.startswith("#"))
    assert lines['distmtl_candidates_total{version="v0"}'] == "30.0"
    assert float(lines['distmtl_score_sum{task="click",version="v0"}']) == pytest.approx(sum(got["scores"]["click"]), rel=1e-6)
    unknown = sum(item >= 40 for item in table["item"].to_pylist())
    assert unknown and float(lines['distmtl_unknown_ids_total{version="v0"}']) == unknown
    ids = 30 * 4 + 2 * sum(map(len, table["tags"].to_pylist()))  # user, item, city, x's bucket; tags twice
    assert float(lines['distmtl_ids_total{version="v0"}']) == ids
    assert lines['distmtl_requests_total{status="200"}'] == lines['distmtl_requests_total{status="400"}'] == "1.0"
    assert lines['distmtl_request_seconds_count{version="v0"}'] == "1.0" and float(lines['distmtl_model_sequence{version="v0"}']) == 1


@pytest.mark.parametrize("price", ["cost", "x"])
def test_a_request_that_can_be_pasted(exports, serve, tmp_path, price):
    """With the token and the price that this server asks for, which may be a column that the model reads too."""
    (tmp_path / "a token").write_text("secret")
    (tmp_path / "fusion.yaml").write_text("fusion: {kind: product, tasks: {click: {}}, price: " + price + "}")
    more = {"token": str(tmp_path / "a token"), "fusion": str(tmp_path / "fusion.yaml")}
    service = serve(exports, exports, **more)
    curl, _, url, _, authorization, _, body = shlex.split(service.settings.request("http://localhost:8000"))
    assert curl == "curl" and url == "http://localhost:8000/v1/score"
    assert authorization == f"Authorization: Bearer $(cat '{tmp_path}/a token')"
    status, got = served.answer(service, body.encode(), headers={"authorization": "Bearer secret"})
    assert status == 200 and got["version"] == "v0" and len(got["order"]) == 2
    scores = described(exports, LIMITS)["components"]["schemas"]["Response"]["properties"]["scores"]["properties"]
    assert scores["click"]["description"] == "P(click)" and "| click | P(click) |" in service.versions["v0"].card()


def test_a_price_that_is_text_does_not_end_the_server(exports, tmp_path):
    (tmp_path / "fusion.yaml").write_text("fusion: {kind: product, tasks: {click: {}}, price: city}")
    shown = Settings({"v": str(exports)}, (1.0,), limits=LIMITS, fusion=str(tmp_path / "fusion.yaml")).request("http://localhost:8000")
    assert '"city": [1, 2]' in shown


@pytest.fixture(scope="module")
def fuzzed(exports):
    service = Service(Settings({"v": str(exports)}, (1.0,), limits=LIMITS))
    yield service, described(exports, LIMITS)
    service.stop()


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bodies_of_any_kind(fuzzed, data):
    """What the schema allows is answered as it says; what is spoilt is refused with a sentence; nothing fails."""
    service, document = fuzzed
    check_any(data, document, lambda content: served.answer(service, content))
