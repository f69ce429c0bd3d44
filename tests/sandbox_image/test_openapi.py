"""The document that describes the API: it says what the server does."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from sandbox_image import openapi, protocol
from sandbox_image.slots import TOOLS
from tests.sandbox_image.running import Api

DOCUMENT = openapi.document(TOOLS)
PATHS = {(method.upper(), path) for path, operations in DOCUMENT["paths"].items() for method in operations}


pytestmark = pytest.mark.any_user


def check(value: object, schema: dict[str, Any]) -> None:
    """Compare a value with a schema of the document."""
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def answer_schema(path: str, method: str, status: int) -> dict[str, Any]:
    responses: dict[str, Any] = DOCUMENT["paths"][path][method]["responses"]
    assert str(status) in responses, f"{method} {path} answers {status}, which the document does not say"
    return dict(responses[str(status)]["content"]["application/json"]["schema"])


def test_routes_are_those_of_the_protocol() -> None:
    assert protocol.__doc__ is not None
    assert set(re.findall(r"^    (GET|POST) +(/\S+)", protocol.__doc__, re.MULTILINE)) == PATHS


async def test_the_server_serves_it(visitor: Api) -> None:
    assert await visitor.get("/openapi.json") == (200, DOCUMENT)
    for method, path in PATHS:
        async with visitor.session.request(method, path, data=b"{}") as response:
            assert "no route" not in await response.text()


def test_every_schema_is_one() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert DOCUMENT["components"]["schemas"]["ExecuteRequest"]["properties"]["timeout"]["maximum"] == protocol.MAX_TIMEOUT_S


REQUESTS: list[tuple[str, object, int]] = [
    ("/execute", {"slot_id": "slot_0", "tool": "bash", "args": {"command": "echo x; exit 3"}}, 200),
    ("/execute", {"slot_id": "slot_0", "tool": "bash", "args": {"command": 3}}, 400),
    ("/execute", {"slot_id": "slot_9", "tool": "bash", "args": {"command": "true"}}, 404),
    ("/execute", {"slot_id": "slot_0", "tool": "read_file", "args": {"path": "missing"}}, 200),
    ("/batch", [{"slot_id": "slot_0", "tool": "bash", "args": {"command": "true"}}, {"slot_id": "slot_0"}], 200),
    ("/batch", [None] * 1001, 413),
    ("/reset", {"slot_id": "slot_0"}, 200),
    ("/layers", {"slot_id": "slot_0", "name": "a layer"}, 400),
    ("/layers", {"slot_id": "slot_0", "name": "described"}, 200),
    ("/layers", {"slot_id": "slot_0", "name": "other", "lease": "old"}, 409),
    ("/layers/delete", {"name": "described"}, 200),
    ("/layers/delete", {"name": "described"}, 404),
    ("/execute", {"slot_id": "slot_0", "tool": "write_file", "args": {"path": "file", "content": "x"}}, 200),
    ("/artifacts/read", {"slot_id": "slot_0", "path": "file"}, 200),
    ("/artifacts/read", {"slot_id": "slot_0", "path": "/etc/passwd"}, 403),
    ("/artifacts/read", {"slot_id": "slot_0", "path": "file", "max_bytes": 0}, 400),
    ("/artifacts/list", {"slot_id": "slot_0"}, 200),
    ("/artifacts/archive", {"slot_id": "slot_0"}, 200),
    ("/artifacts/archive", {"slot_id": "slot_0", "max_bytes": 1}, 413),
]


async def test_requests_and_answers_conform(api: Api) -> None:
    for path, payload, expected in REQUESTS:
        status, answer = await api.post(path, payload)
        assert status == expected, (path, payload, answer)
        check(answer, answer_schema(path, "post", status))
        schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        if status == 200 and path != "/batch":
            check(payload, schema)
        elif path not in ("/layers",) and status == 400:
            with pytest.raises(jsonschema.ValidationError):
                check(payload, schema)
    for path in ("/health", "/slots", "/layers"):
        status, answer = await api.get(path)
        check(answer, answer_schema(path, "get", status))
