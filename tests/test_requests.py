"""What a request may say: every mistake is one sentence with a status of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import served
from hypothesis import given
from hypothesis import strategies as st

from distmtl.data.collate import alike
from distmtl.data.schema import kind_of, served_columns
from distmtl.errors import DistmtlError
from distmtl.serving.columns import Column, columns
from distmtl.serving.fusion import LinearFusion, ProductFusion, Term, parse_fusion
from distmtl.serving.request import KEYS, BadRequest, Limits, parse_body, parse_rows

LIMITS = Limits(candidates=4, list=8, body_kb=16)
PLAIN = ProductFusion(tasks={"click": Term()})
PRICED = ProductFusion(tasks={"click": Term()}, price="cost")
TABLE = served.rows(3)


@pytest.fixture(scope="module")
def known():
    config = served.config(Path(), Path())
    return columns(config, {name: kind_of(TABLE.schema.field(name).type) for name in served_columns(config)}, LIMITS.list)


def good(**candidates) -> dict:
    body = served.body(TABLE)
    body["candidates"] |= candidates
    return body


def with_context(**context) -> dict:
    body = good()
    body["context"] |= context
    return body


def test_columns_repeat_or_go_along(known):
    request = parse_rows(parse_body(json.dumps(good()).encode()), known, PLAIN, LIMITS)
    assert request.table.column_names == list(known) and request.price is None
    assert {name: request.table[name].to_pylist() for name in known} == {name: TABLE[name].to_pylist() for name in known}


def test_nulls_whole_numbers_and_no_candidates(known):
    body = with_context(user=None, x=3) | {"candidates": {"item": [], "tags": [], "image": []}}
    assert parse_rows(parse_body(json.dumps(body).encode()), known, PLAIN, LIMITS).table.num_rows == 0
    body = with_context(x=2**63)  # Arrow would refuse it as a float
    body["candidates"] = {"item": [None, 2**63 - 1], "tags": [None, []], "image": [None, [1, 2, 3]]}
    table = parse_rows(parse_body(json.dumps(body).encode()), known, PLAIN, LIMITS).table
    assert table["x"].to_pylist() == [2.0**63] * 2 and table["image"].to_pylist() == [None, [1.0, 2.0, 3.0]]


def test_unsigned_ids_are_what_training_makes_of_them(known):
    body = good(item=[1, 2**63, 2**64 - 1])
    table = parse_rows(parse_body(json.dumps(body).encode()), known, PLAIN, LIMITS).table
    trained = alike(pa.table({"item": pa.array(body["candidates"]["item"], pa.uint64())}))
    assert table["item"].to_pylist() == trained["item"].to_pylist() == [1, -(2**63), -1]


def test_what_is_given_once_and_spread_over_all_is_bounded():
    """A megabyte of strings times a thousand candidates would be a gigabyte of memory for one request."""
    wide = {
        "words": Column("words", "string", (0, 1000), (0, 0), True),
        "item": Column("item", "integer", None, (0, 9), True),
    }
    body = {"context": {"words": ["x" * 1000] * 900}, "candidates": {"item": [1] * 1000}}
    with pytest.raises(BadRequest, match="context.words has .* bytes, and there are 1000 candidates") as refused:
        parse_rows(body, wide, PLAIN, Limits())
    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (with_context(user=True), "context.user is a truth value; give an integer or null"),
        (with_context(user=1.0), "context.user is the number 1.0; give an integer or null"),
        (with_context(user="1"), "context.user is a string"),
        (with_context(user=200), "context.user is 200; give an integer from 0 to 199"),
        (with_context(user=-1), "context.user is -1"),
        (with_context(city=7), "context.city is the number 7; give a string or null"),
        (with_context(city="x" * 1025), "context.city has 1025 characters"),
        (with_context(city="\ud800"), "half of a surrogate pair"),
        (with_context(x=False), "context.x is a truth value; give a number or null"),
        (with_context(x=1e39), r"context.x is 1e\+39; give a number from -3.4e\+38"),
        (with_context(usr=1), "context: the model reads no 'usr'; did you mean 'user'"),
        (with_context(item=1), "'item' is given in context and in candidates"),
        (good(item=[1, 2]), "has 3 values, and candidates|has 2 values, and candidates"),
        (good(item=1), "candidates.item is the number 1; give a list"),
        (good(item=[1, 2.5, 3]), r"candidates.item\[1\] is the number 2.5"),
        (good(item=[1, 2, 2**64]), r"candidates.item\[2\] is 1.8\d*e\+19; give an integer of 64 bits"),
        (good(tags=[[1], 2, None]), r"candidates.tags\[1\] is the number 2; give a list or null"),
        (good(tags=[[1], [], [3, None]]), r"candidates.tags\[2\]: an element is null"),
        (good(tags=[[1], [], [3, 20]]), r"candidates.tags\[2\]: an element is 20; give an integer from 0 to 19"),
        (good(tags=[[1], [1] * 6, []]), r"candidates.tags\[1\] is a list of 6; give 0 to 5"),
        (good(image=[[1, 2, 3], [1, 2], None]), r"candidates.image\[1\] is a list of 2; give 3"),
        (good(item=[{}, 1, 2]), r"candidates.item\[0\] is an object"),
        ({**good(), "candidates": {k: v[:1] * 5 for k, v in good()["candidates"].items()}}, "5 candidates, and a request may have 4"),
        ({**good(), "candidates": {}}, "candidates has no column"),
        ({**good(), "candidates": [1]}, "candidates is a list"),
        ({**good(), "contxt": {}}, "unknown key 'contxt'; did you mean 'context'"),
        ({"candidates": good()["candidates"]}, "'user' is missing"),
        ([], "not an object"),
    ],
)
def test_mistakes(known, body, sentence):
    with pytest.raises(BadRequest, match=sentence) as e:
        parse_rows(parse_body(json.dumps(body).encode()), known, PLAIN, LIMITS)
    assert e.value.status == 422


def test_all_mistakes_are_told_at_once(known):
    body = with_context(usr=1, x="a")
    del body["candidates"]["image"]
    body["candidates"] |= {"item": 1, "tags": [[1]]}
    with pytest.raises(BadRequest) as refused:
        parse_rows(body, known, PLAIN, LIMITS)
    told = str(refused.value).split(" | ")
    assert told[0].startswith("context: the model reads no 'usr'") and {t.split(" is ")[0] for t in told[1:]} == {
        "candidates.item",
        "context.x",
        "'image'",
    }


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"context": {"x": NaN}}', "NaN is no JSON number"),
        (b'{"context": {"x": -Infinity}}', "-Infinity"),
        (b'{"context": {"x": 1, "x": 2}}', "'x' is given twice"),
        (b'{"context": {"x": 1, "\\u0078": 2}}', "'x' is given twice"),
        (b'{"fusion": {"a": 1, "b": {"c": 1, "c": 1}}}', "'c' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"context": {"user": ' + b"9" * 5000 + b"}}", "not JSON"),
    ],
)
def test_what_is_no_request(body, sentence):
    with pytest.raises(BadRequest, match=sentence) as e:
        parse_body(body)
    assert e.value.status == 400


@given(st.dictionaries(st.sampled_from(KEYS[:2]), st.dictionaries(st.text(), st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))))  # fmt: skip
def test_a_body_is_read_as_python_reads_json(raw):
    """Colons in strings, objects in lists, any escape: whichever parser reads it."""
    expected = repr(raw | {key: {} for key in KEYS[:2] if key not in raw})
    for text in (json.dumps(raw), json.dumps(raw, ensure_ascii=False, indent=1)):
        assert repr(parse_body(text.encode())) == expected


def test_price(known):
    parse = lambda body, fusion: parse_rows(parse_body(json.dumps(body).encode()), known, fusion, LIMITS)  # noqa: E731
    assert parse(good(cost=[1, 2.5, 3]), PRICED).price.tolist() == [1, 2.5, 3]
    assert parse(good(price=[1, 2, 3]), PLAIN).price is None, "clients may send it before the fusion asks for it"
    for body, sentence in (
        (good(), "'cost' is missing: the fusion multiplies by it"),
        (good(cost=[1, 0, 1]), "give a finite number above 0"),
        (good(cost=[1, None, 1]), r"cost\[1\] is null"),
    ):
        with pytest.raises(BadRequest, match=sentence):
            parse(body, PRICED)
    by_x = ProductFusion(tasks={"click": Term()}, price="x")
    np.testing.assert_array_equal(parse(with_context(x=2), by_x).price, [2.0] * 3)
    with pytest.raises(BadRequest, match="x of candidate 0 is -1.0"):
        parse(with_context(x=-1), by_x)


def test_fusion_of_a_request():
    assert parse_fusion({"tasks": {"click": {"beta": 2}}}) == ProductFusion(tasks={"click": Term(beta=2)})
    assert parse_fusion({"kind": "linear", "tasks": {"click": 1}}) == LinearFusion(kind="linear", tasks={"click": 1.0})
    for raw in (
        [],
        {"tasks": {}},
        {"tasks": {"click": {"alpha": -1}}},
        {"kind": "cubic"},
        {"tasks": {"click": {"beta": "2"}}},
        {"taks": {}},
    ):
        with pytest.raises(DistmtlError, match="^fusion"):
            parse_fusion(raw)
