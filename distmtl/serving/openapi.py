"""What /openapi.json says: OpenAPI 3.1, its schemas made from the columns that a model reads and the tasks that it predicts."""

from __future__ import annotations

from typing import Any

from distmtl.config import Config, MulticlassTask
from distmtl.exporting.manifest import Manifest
from distmtl.scores import meaning
from distmtl.serving.columns import MAX_STRING, Column
from distmtl.serving.fusion import FUSION
from distmtl.serving.request import PRICE, Limits

REF = "#/components/schemas/"
JSON = "application/json"


def openapi(manifest: Manifest, config: Config, columns: dict[str, Column], limits: Limits) -> dict[str, Any]:
    fusion = FUSION.json_schema(ref_template=REF + "{model}")
    schemas = fusion.pop("$defs") | {
        "Fusion": fusion,
        "Request": _request(columns, limits),
        "Response": _response(config),
        "Error": _object({"error": {"type": "string", "description": "what is wrong, a sentence for each mistake"}}),
    }
    refused = {
        status: _answer(text, {"$ref": f"{REF}Error"})
        for status, text in {
            "400": "it is not JSON",
            "401": "no bearer token, or another",
            "413": f"the body has more than {limits.body_kb} kB, or a column of its context, once for every candidate, more than 64 MiB",
            "422": "it is JSON, but no request that the model takes",
            "503": "too many requests wait; come again",
        }.items()
    }
    text = {"type": "string"}
    return {
        "openapi": "3.1.0",
        "info": {"title": manifest.name, "version": manifest.digest, "description": "Scores of a multi-task ranking model."},
        "paths": {
            "/v1/score": {
                "post": {
                    "summary": "Score candidates for one context.",
                    "parameters": [
                        {
                            "name": "X-Split-Key",
                            "in": "header",
                            "schema": text,
                            "description": "a user or session: all its requests get the same version",
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {JSON: {"schema": {"$ref": f"{REF}Request"}, "example": example(manifest, config, columns, limits)}},
                    },
                    "responses": {"200": _answer("scores", {"$ref": f"{REF}Response"}), **refused},
                }
            },
            "/v1/health": {"get": {"summary": "The process lives.", "responses": {"200": _answer("it does", {"type": "object"})}}},
            "/v1/ready": {"get": {"summary": "Models are loaded.", "responses": {"200": _answer("they are", {"type": "object"})}}},
            "/v1/model": {"get": {"summary": "What is served.", "responses": {"200": _answer("versions", {"type": "object"})}}},
            "/openapi.json": {"get": {"summary": "This.", "responses": {"200": _answer("OpenAPI 3.1", {"type": "object"})}}},
            "/metrics": {
                "get": {
                    "summary": "For Prometheus.",
                    "responses": {"200": {"description": "text", "content": {"text/plain": {"schema": text}}}},
                }
            },
        },
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def example(manifest: Manifest, config: Config, columns: dict[str, Column], limits: Limits) -> dict[str, Any]:
    """A request that the model answers: two candidates, for one of data.group where the model reads that. Of a domain that is text
    nothing here knows a value that was trained."""
    candidates = range(1, min(limits.candidates, 2) + 1)
    varying = {name: [_typical(column, i) for i in candidates] for name, column in columns.items()}
    domain = next((f.source for f in config.features if f.name == config.domain), None)
    if domain and manifest.domains and columns[domain].item == "integer":
        value = manifest.domains[0] if columns[domain].lengths is None else [manifest.domains[0]]
        varying[domain] = [value] * len(candidates)
    context = {name: varying.pop(name)[0] for name in list(varying) if name == config.data.group and len(varying) > 1}
    return {"context": context, "candidates": varying}


def _typical(column: Column, i: int) -> Any:
    """A value of it, of integers that are ids the i-th; null for a vector."""
    if column.lengths and column.lengths[0] > 1 and column.nullable:
        return None
    low, high = column.bounds
    if column.item == "string":
        value: Any = f"{column.name}-{i}"[-MAX_STRING:]
    else:
        value = min(max(i if column.typical is None else column.typical, low), high)
        value = round(value) if column.item == "integer" else value
    return value if column.lengths is None else [value] * max(column.lengths[0], min(column.lengths[1], 1))


def _answer(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {JSON: {"schema": schema}}}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    required = list(properties) if required is None else required
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}


def _request(columns: dict[str, Column], limits: Limits) -> dict[str, Any]:
    """Every column in exactly one of the two places; that lists of candidates are equally long is beyond JSON Schema."""
    values = {name: _value(c) for name, c in ({PRICE.name: PRICE} | columns).items()}
    lists = {name: {"type": "array", "maxItems": limits.candidates, "items": value} for name, value in values.items()}
    once = [
        {"oneOf": [{"required": [place], "properties": {place: {"required": [name]}}} for place in ("context", "candidates")]}
        for name in columns
    ]
    properties = {
        "context": {**_object(values, []), "description": "columns that are the same for all candidates"},
        "candidates": {
            **_object(lists, []),
            "minProperties": 1,
            "description": "columns that differ, a value for each candidate; all lists equally long. `price` is for the fusion alone, "
            "where the model does not read it.",
        },
        "fusion": {"$ref": f"{REF}Fusion", "description": "instead of the server's own"},
        "version": {"type": "string", "description": "instead of what the split chooses"},
    }
    return {**_object(properties, ["candidates"]), "allOf": once}


def _value(column: Column) -> dict[str, Any]:
    item: dict[str, Any] = {"type": column.item}
    if column.item == "string":
        item["maxLength"] = MAX_STRING
    else:
        item["minimum"], item["maximum"] = column.bounds
    if column.lengths:
        item = {"type": "array", "items": item, "minItems": column.lengths[0], "maxItems": column.lengths[1]}
    return {**item, "type": [item["type"], "null"]} if column.nullable else item


def _response(config: Config) -> dict[str, Any]:
    number = {"type": "number"}
    scores = {
        t.name: {
            "type": "array",
            "description": meaning(config, t),
            "items": {"type": "array", "items": number, "minItems": t.classes, "maxItems": t.classes}
            if isinstance(t, MulticlassTask)
            else number,
        }
        for t in config.tasks
    }
    return _object(
        {
            "version": {"type": "string", "description": "its name"},
            "digest": {"type": "string", "description": "the export's, or the last delta's"},
            "scores": _object(scores),
            "fused": {"type": "array", "items": number},
            "order": {
                "type": "array",
                "items": {"type": "integer"},
                "description": "candidates, the best first; of equal ones the first first",
            },
        }
    )
