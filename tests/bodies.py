"""Bodies of any kind, made from what /openapi.json says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from jsonschema import Draft202012Validator


def values(schema: dict) -> st.SearchStrategy:
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    bounded = lambda cast: {"min_value": max(cast(schema["minimum"]), -(10**6)), "max_value": min(cast(schema["maximum"]), 10**6)}  # noqa: E731
    of = {
        "integer": lambda: st.integers(schema["minimum"], schema["maximum"]),
        "number": lambda: st.floats(**bounded(float)) | st.integers(**bounded(int)),
        "string": lambda: st.text(max_size=min(schema["maxLength"], 20)),
        "array": lambda: st.lists(values(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"]),
        "null": st.none,
    }
    return st.one_of(*(of[kind]() for kind in kinds))


@st.composite
def bodies(draw, document: dict) -> dict:
    request = document["components"]["schemas"]["Request"]
    columns = request["properties"]["context"]["properties"]
    n = draw(st.integers(0, 6))
    names = sorted(c["oneOf"][0]["properties"]["context"]["required"][0] for c in request["allOf"])
    varying = draw(st.sets(st.sampled_from(names), min_size=1))
    return {
        "context": {name: draw(values(columns[name])) for name in names if name not in varying},
        "candidates": {name: draw(st.lists(values(columns[name]), min_size=n, max_size=n)) for name in sorted(varying)},
    }


def spoilt(body: dict, how: int, draw) -> bytes:
    """The body with one mistake in it."""
    body = copy.deepcopy(body)
    places = [(body[place], name) for place in ("context", "candidates") for name in body[place]]
    at, name = places[draw(st.integers(0, len(places) - 1))]
    other = body["candidates"] if at is body["context"] else body["context"]
    junk = draw(st.sampled_from([True, {}, {"a": 1}, 1e39, 10**400, -(10**39), "\ud800", "x" * 2000, [[]], [True], [{}]]))
    match how:
        case 0:
            del at[name]
        case 1:
            at[name + "_"] = at[name]
        case 2:
            other[name] = at[name]
        case 3:
            at[name] = junk if at is body["context"] else [*at[name], junk]
        case 4:
            body["candidates"]["price"] = [1.0] * (len(next(iter(body["candidates"].values()))) + 1)
        case 5:
            body[draw(st.text(max_size=5))] = 1
        case 6:
            return json.dumps(body).encode()[: draw(st.integers(0, 20))]
        case 7:
            return json.dumps(body).encode().replace(b"{", b'{"a": NaN, ', 1)
        case 8:
            return draw(st.binary(max_size=50))
        case 9:
            body["candidates"] = {k: [None] * 41 for k in body["candidates"]}
        case 10:
            body["fusion"] = draw(st.sampled_from([1, [], {}, {"tasks": {"rating": True}}, {"tasks": {"clik": {}}}, {"price": 1}]))
        case 11:
            at[name] = junk
    return json.dumps(body).encode()


def check_any(data: Any, document: dict, answer: Callable[[Any], tuple[int, Any]]) -> None:
    """What the schema allows is answered as it says; what is spoilt is refused with a sentence; nothing fails."""
    body = data.draw(bodies(document))
    validator = Draft202012Validator({**document, "$ref": "#/components/schemas/Request"})
    assert validator.is_valid(body), list(validator.iter_errors(body))
    status, got = answer(body)
    assert status == 200, got
    Draft202012Validator({**document, "$ref": "#/components/schemas/Response"}).validate(got)
    n = len(next(iter(body["candidates"].values())))
    assert sorted(got["order"]) == list(range(n)) and all(len(p) == n for p in got["scores"].values())
    content = spoilt(body, data.draw(st.integers(0, 11)), data.draw)
    status, got = answer(content)
    assert 400 <= status < 500 and set(got) == {"error"} and got["error"], content
