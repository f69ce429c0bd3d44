"""The slot server's API as an OpenAPI 3.1 document, made from the messages of `sandbox_image.protocol` themselves."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from sandbox_image import protocol
from sandbox_image.protocol import ErrorKind, Range, Wire

Schema = dict[str, Any]

_TYPES: dict[object, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    types.NoneType: {"type": "null"},
    Any: {},
}
_NAMES_OF_LAYERS: Schema = {
    "type": "object",
    "properties": {"layers": {"type": "array", "items": {"type": "string"}}},
    "required": ["layers"],
}
_STATES_OF_SLOTS: Schema = {
    "type": "object",
    "properties": {"slots": {"type": "array", "items": {"$ref": "#/components/schemas/SlotState"}}},
    "required": ["slots"],
}


@dataclass(frozen=True)
class Route:
    """What a route takes and gives: a message, or a schema that holds messages; and what can go wrong beside a bad request."""

    method: Literal["GET", "POST"]
    path: str
    request: type[Wire] | Schema | None
    answer: type[Wire] | Schema
    errors: tuple[ErrorKind, ...] = ()


_SLOT_ERRORS = (ErrorKind.NOT_FOUND, ErrorKind.LEASE_EXPIRED, ErrorKind.SLOT_FAILED, ErrorKind.SHUTTING_DOWN)
_FILE_ERRORS = (*_SLOT_ERRORS, ErrorKind.OUTSIDE_WORKSPACE)
ROUTES = (
    Route("POST", "/execute", protocol.ExecuteRequest, protocol.ExecutionResult, _SLOT_ERRORS),
    Route(
        "POST",
        "/batch",
        {
            "type": "array",
            "items": {"$ref": "#/components/schemas/ExecuteRequest"},
            "maxItems": protocol.MAX_BATCH_ITEMS,
        },
        {
            "type": "array",
            "items": {
                "anyOf": [{"$ref": "#/components/schemas/ExecutionResult"}, {"$ref": "#/components/schemas/Failure"}],
            },
        },
    ),
    Route("POST", "/reset", protocol.ResetRequest, protocol.SlotState, (*_SLOT_ERRORS, ErrorKind.NO_ROOM)),
    Route("POST", "/layers", protocol.FreezeRequest, protocol.SlotState, (*_SLOT_ERRORS, ErrorKind.NO_ROOM)),
    Route("POST", "/layers/delete", protocol.DeleteLayerRequest, _NAMES_OF_LAYERS, (ErrorKind.NOT_FOUND,)),
    Route("GET", "/layers", None, _NAMES_OF_LAYERS),
    Route("GET", "/health", None, protocol.Health),
    Route("GET", "/slots", None, _STATES_OF_SLOTS),
    Route("GET", "/openapi.json", None, {"type": "object"}),
    Route("POST", "/artifacts/read", protocol.ArtifactReadRequest, protocol.ArtifactContent, _FILE_ERRORS),
    Route("POST", "/artifacts/list", protocol.ArtifactListRequest, protocol.ArtifactListing, _FILE_ERRORS),
    Route("POST", "/artifacts/archive", protocol.ArtifactArchiveRequest, protocol.ArtifactArchive, _FILE_ERRORS),
)
"""All routes of the server."""


def document(tools: Mapping[str, type[Wire]]) -> Schema:
    """The document for a server with these tools, by name, with the messages of their arguments."""
    messages = {message for route in ROUTES for message in (route.request, route.answer) if isinstance(message, type)} | {
        protocol.Failure,
        protocol.BatchLine,
        protocol.SlotState,
        protocol.ExecutionResult,
        *tools.values(),
    }
    schemas = {message.__name__: schema_of(message) for message in sorted(messages, key=lambda message: message.__name__)}
    schemas["ExecuteRequest"] = _of_calls(schemas["ExecuteRequest"], tools)
    schemas["Failure"]["properties"]["kind"] = {"enum": [kind.value for kind in ErrorKind]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slot server", "version": str(protocol.VERSION), "description": inspect.getdoc(protocol)},
        "paths": _paths(),
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _paths() -> Schema:
    paths: dict[str, Schema] = {}
    for route in ROUTES:
        operation: Schema = {"operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('.', '_')}"}
        errors = [ErrorKind.UNAUTHORIZED, *route.errors]
        if isinstance(route.request, type):
            operation["description"] = inspect.getdoc(route.request)
        if route.request is not None:
            errors += [ErrorKind.BAD_REQUEST, ErrorKind.TOO_LARGE]
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": _reference(route.request)}},
            }
        content = {"application/json": {"schema": _reference(route.answer)}}
        if route.path == "/batch":
            content["application/x-ndjson"] = {"schema": _reference(protocol.BatchLine)}
        operation["responses"] = {"200": {"description": "Served.", "content": content}, **_failures(errors)}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return paths


def _failures(kinds: Iterable[ErrorKind]) -> Schema:
    content = {"application/json": {"schema": _reference(protocol.Failure)}}
    ordered = sorted(kinds, key=lambda kind: kind.status)
    return {str(kind.status): {"description": f"Not served: `{kind.value}`.", "content": content} for kind in ordered}


def _reference(what: type[Wire] | Schema) -> Schema:
    return {"$ref": f"#/components/schemas/{what.__name__}"} if isinstance(what, type) else what


def _of_calls(schema: Schema, tools: Mapping[str, type[Wire]]) -> Schema:
    """A tool's name says what its arguments must be."""
    calls = [
        {"properties": {"tool": {"const": name}, "args": _reference(arguments)}, "required": ["tool", "args"]}
        for name, arguments in tools.items()
    ]
    return {**schema, "oneOf": calls}


def schema_of(message: type[Wire]) -> Schema:
    """The JSON schema of a message."""
    annotations = typing.get_type_hints(message, include_extras=True)
    properties: Schema = {}
    required: list[str] = []
    for spec in dataclasses.fields(message):
        properties[spec.name] = _of_type(annotations[spec.name])
        if spec.default is not MISSING:
            properties[spec.name]["default"] = spec.default
        elif spec.default_factory is MISSING:
            required.append(spec.name)
    return {
        "type": "object",
        "description": inspect.getdoc(message),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _of_type(expected: Any) -> Schema:
    limits = protocol.range_of(expected)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        schema = _of_type(arguments[0])
        return schema if limits is None else {**schema, **_of_range(limits)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of_type(option) for option in arguments]}
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _of_type(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(arguments[1])}
    return dict(_TYPES[expected])


def _of_range(limits: Range) -> Schema:
    return {"exclusiveMinimum" if limits.above else "minimum": limits.low, "maximum": limits.high}
