"""What the service refuses, as the real SDK shows it."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

if missing := [package for package in ("torch", "tinker") if importlib.util.find_spec(package) is None]:
    pytest.skip(f"needs {' and '.join(missing)}", allow_module_level=True)

import aiohttp
import tinker
from pydantic import ValidationError
from tinker import types

from tests.tinker_service.clients import Client, client_of_new_service, imitate, policy_datum, sampled, scores, text_datum
from tests.tinker_service.model import TinyModelOptions

PROMPT = [5, 6, 7, 8]


def datum(tokens: list[int], **inputs: list[float]) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


IMPOSSIBLE_TRAINING: list[tuple[str, str, dict[str, float] | None, list[types.Datum]]] = [
    ("dro", "is not one of", None, [policy_datum(PROMPT, [1], [-1.0], 1.0)]),
    ("ppo", "knows", {"clip_high": 2.0}, [policy_datum(PROMPT, [1], [-1.0], 1.0)]),
    ("importance_sampling", "lacks loss_fn_inputs", None, [text_datum(PROMPT)]),
    ("importance_sampling", "vocabulary", None, [policy_datum(PROMPT, [100_000], [-1.0], 1.0)]),
    ("importance_sampling", "vocabulary", None, [policy_datum([-1, *PROMPT], [1], [-1.0], 1.0)]),
    ("importance_sampling", "the loss is", None, [policy_datum(PROMPT, [1], [-1000.0], 1.0)]),
    ("importance_sampling", "the loss is", None, [policy_datum(PROMPT, [1], [-1.0], float("nan"))]),
    ("importance_sampling", "does not know", None, [policy_datum(PROMPT, [1], [-1.0], 1.0, clip_low_threshold=[1.0] * 4)]),
    ("cross_entropy", "shape", None, [datum(PROMPT, target_tokens=[1, 2, 3], weights=[1.0] * 4)]),
    ("cross_entropy", "1 to 1024", None, [text_datum([1] * 1026)]),
    ("cross_entropy", "1 to 1024", None, [datum([], target_tokens=[], weights=[])]),
]


@pytest.mark.parametrize(("loss", "reason", "config", "data"), IMPOSSIBLE_TRAINING)
async def test_impossible_training_data_fails_and_leaves_the_model_as_it_was(
    client: Client, loss: Any, reason: str, config: dict[str, float] | None, data: list[types.Datum]
) -> None:
    training = await client.new_model()
    good = [text_datum(PROMPT)]
    other = await client.new_model()
    await training.forward_backward(good, "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match=reason) as failure:
        await training.forward_backward([*data], loss, config)
    assert failure.value.category == types.RequestErrorCategory.User
    await training.optim_step(types.AdamParams(learning_rate=0.01))
    await imitate(other, good)
    assert await scores(training, good) == await scores(other, good)


@pytest.mark.parametrize(
    ("reason", "prompt", "params"),
    [
        ("context window", PROMPT, {"max_tokens": 29}),
        ("at least one token", [], {}),
        ("ids below", [100_000], {}),
        ("ids below", [-1], {}),
        ("max_tokens is 0", PROMPT, {"max_tokens": 0}),
        ("temperature", PROMPT, {"temperature": -1.0}),
        ("top_k", PROMPT, {"top_k": 0}),
        ("empty text", PROMPT, {"stop": ["a", ""]}),
    ],
)
async def test_impossible_samples_are_refused(
    tokenizer: PreTrainedTokenizerFast, reason: str, prompt: list[int], params: dict[str, Any]
) -> None:
    async with client_of_new_service(tokenizer, model={"context_length": 32}) as client:
        sampler = await client.base_sampler()
        with pytest.raises(tinker.BadRequestError, match=reason):
            await sampled(sampler, prompt, **params)
        for limit in (28, None):
            assert len((await sampled(sampler, PROMPT, max_tokens=limit))[0].tokens) == 28


async def test_what_is_not_there_is_not_found(client: Client) -> None:
    training = await client.new_model()
    path = (await training.save_weights_for_sampler("there")).path
    elsewhere = path.replace("there", "elsewhere")
    sdk = client.sdk
    lost: list[Callable[[], Awaitable[object]]] = [
        lambda: sdk.create_lora_training_client("another/model"),
        lambda: sdk.create_sampling_client(base_model="another/model"),
        lambda: sdk.create_sampling_client(model_path=elsewhere),
        lambda: sdk.create_sampling_client(model_path="tinker://../../weights/there"),
        lambda: sdk.create_training_client_from_state(elsewhere),
    ]
    for ask in lost:
        with pytest.raises(tinker.NotFoundError):
            await ask()


async def test_a_checkpoint_is_not_overwritten_unless_asked(client: Client) -> None:
    training = await client.new_model()
    await training.save_state("same")
    with pytest.raises(tinker.RequestFailedError, match="already"):
        await training.save_state("same")
    await training.save_state("same", overwrite=True)
    with pytest.raises(tinker.RequestFailedError, match="cannot be named"):
        await training.save_state("../same")


async def test_weights_for_samplers_have_no_optimizer_to_resume(client: Client) -> None:
    training = await client.new_model()
    path = (await training.save_weights_for_sampler("sampler")).path
    with pytest.raises(tinker.RequestFailedError, match="no optimizer state"):
        await client.sdk.create_training_client_from_state_with_optimizer(path)
    await client.sdk.create_training_client_from_state(path)


async def test_a_request_of_too_many_bytes_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    async with client_of_new_service(tokenizer, max_request_bytes=20_000) as client:
        training = await client.new_model()
        await training.forward([text_datum(PROMPT)], "cross_entropy")
        with pytest.raises(tinker.APIStatusError) as refusal:
            await training.forward([text_datum([1] * 1000)] * 4, "cross_entropy")
        assert refusal.value.status_code == 413


async def test_a_client_that_waits_for_long_is_told_to_try_again(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of_new_service(tokenizer, long_poll_s=0.002) as client:
        sampler = await client.base_sampler()
        sequences = await sampled(sampler, PROMPT, 64, max_tokens=50)
    assert len(sequences) == 64
    assert "try_again" in caplog.text


async def test_requests_wait_for_those_before_them(client: Client) -> None:
    """A number that never came holds up the later ones, as nobody knows what it would have changed."""
    training = await client.new_model()
    skipped = training._get_request_id()
    training._turn_counter += 1
    later = training.forward([text_datum(PROMPT)], "cross_entropy")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await asyncio.shield(later.coroutine())
    headers = {"X-API-Key": "tml-tests"}
    body = {"model_id": training.model_id, "seq_id": skipped + 1, "adam_params": {"learning_rate": 0.0}}
    async with aiohttp.ClientSession(headers=headers) as session:
        await session.post(f"{client.base_url}/api/v1/optim_step", json=body)
    assert len((await later).loss_fn_outputs) == 1


async def test_a_request_that_is_sent_again_is_done_once(client: Client) -> None:
    training = await client.new_model()
    body = {"model_id": training.model_id, "seq_id": 1, "path": "once"}
    async with aiohttp.ClientSession(headers={"X-API-Key": "tml-tests"}) as session:
        for _ in range(2):
            async with session.post(f"{client.base_url}/api/v1/save_weights", json=body) as response:
                request = {"request_id": (await response.json())["request_id"]}
            async with session.post(f"{client.base_url}/api/v1/retrieve_future", json=request) as response:
                assert (await response.json())["path"] == f"tinker://{training.model_id}/weights/once"


async def test_wrong_keys_bodies_and_unknown_requests_have_their_status(client: Client) -> None:
    key = {"X-API-Key": "tml-tests"}
    cases: list[tuple[int, str, dict[str, str], bytes]] = [
        (401, "create_session", {}, b"{}"),
        (401, "create_session", {"X-API-Key": "sk-1"}, b"{}"),
        (422, "create_session", key, b"{"),
        (422, "create_session", key, b'{"tags": [], "user_metadata": {}, "sdk_version": "1", "unknown": 1}'),
        (422, "forward_backward", key, b"\xff\xff"),
        (404, "forward_backward", key, b""),
        (404, "retrieve_future", key, b'{"request_id": "none"}'),
        (404, "session_heartbeat", key, b'{"session_id": "none"}'),
        (404, "no_such_route", key, b"{}"),
    ]
    async with aiohttp.ClientSession() as session:
        for status, route, headers, body in cases:
            async with session.post(f"{client.base_url}/api/v1/{route}", data=body, headers=headers) as response:
                assert (response.status, route) == (status, route)
        async with session.get(f"{client.base_url}/api/v1/healthz") as response:
            assert await response.json() == {"status": "ok"}


async def test_a_finished_session_takes_no_more_requests(client: Client) -> None:
    training = await client.new_model()
    session_id = training.model_id.partition(":")[0]
    async with aiohttp.ClientSession(headers={"X-API-Key": "tml-tests"}) as session:
        for name, status in ((session_id, 200), (session_id, 200), ("unknown", 404)):
            async with session.post(f"{client.base_url}/api/v1/sessions/{name}/finish", json={}) as response:
                assert response.status == status
    with pytest.raises(tinker.APIStatusError) as refusal:
        await training.forward([text_datum(PROMPT)], "cross_entropy")
    assert refusal.value.status_code == 410


@pytest.mark.parametrize("options", [{"heads": 3}, {"initial_bias": {100: 1.0}}, {"vocabulary_size": 0}, {"hiden": 3}])
def test_impossible_model_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TinyModelOptions.model_validate({"vocabulary_size": 100} | options)
