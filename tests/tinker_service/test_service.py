"""The real SDK trains and samples with the service."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.engine.tokenizer import make_tokenizer

if missing := [package for package in ("torch", "tinker") if importlib.util.find_spec(package) is None]:
    pytest.skip(f"needs {' and '.join(missing)}", allow_module_level=True)

import tinker
from tinker import types

from tests.support.waiting import PATIENCE_S
from tests.tinker_service.clients import (
    Client,
    client_of_new_service,
    connected,
    imitate,
    policy_datum,
    sampled,
    scores,
    text_datum,
)

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def prompt(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.encode("List the files of the repository")


async def test_logprobs_of_samples_scores_and_training_agree(client: Client, prompt: list[int]) -> None:
    training = await client.new_model()
    sampler = await training.save_weights_and_get_sampling_client()
    prompts = [prompt[:1], prompt, prompt * 3]
    groups = await asyncio.gather(*(sampled(sampler, each, 5, max_tokens=20, temperature=0.7) for each in prompts))
    for each, group in zip(prompts, groups, strict=True):
        data = [policy_datum(each, sequence.tokens, sequence.logprobs or [], 0.5) for sequence in group]
        trained = await training.forward_backward(data, "importance_sampling")
        for sequence, output in zip(group, trained.loss_fn_outputs, strict=True):
            scored = await sampler.compute_logprobs(types.ModelInput.from_ints(each + sequence.tokens))
            assert len(sequence.tokens) == 20
            assert sequence.stop_reason == "length"
            assert scored[0] is None
            assert scored[len(each) :] == pytest.approx(sequence.logprobs, abs=1e-4)
            assert output["logprobs"].tolist() == pytest.approx(scored[1:], abs=1e-4)
        # On the policy that sampled, every ratio is 1: the loss is minus the sum of the advantages.
        assert trained.metrics["loss:sum"] == pytest.approx(-0.5 * 20 * len(group), rel=1e-4)


async def test_a_partial_score_is_the_end_of_the_whole(client: Client, prompt: list[int]) -> None:
    sampler = await (await client.new_model()).save_weights_and_get_sampling_client()
    whole = await sampler.compute_logprobs(types.ModelInput.from_ints(prompt))
    part = await sampler.compute_logprobs(types.ModelInput.from_ints(prompt), prompt_logprobs_last_n=3)
    assert part == [None] * (len(prompt) - 3) + whole[-3:]


async def test_policy_gradients_raise_a_rewarded_token(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> None:
    rewarded = 300
    rewards = []
    async with client_of_new_service(tokenizer, model={"initial_bias": {rewarded: 4.0}}) as client:
        training = await client.new_model()
        for _ in range(15):
            sampler = await training.save_weights_and_get_sampling_client()
            group = await sampled(sampler, prompt, 64, max_tokens=4)
            shares = [sequence.tokens.count(rewarded) / 4 for sequence in group]
            mean = sum(shares) / len(shares)
            rewards.append(mean)
            data = [policy_datum(prompt, s.tokens, s.logprobs or [], r - mean) for s, r in zip(group, shares, strict=True)]
            loss = training.forward_backward(data, "importance_sampling")
            await training.optim_step(types.AdamParams(learning_rate=0.01))
            await loss
    assert rewards[0] < 0.25
    assert rewards[-1] > 0.8


async def test_policy_losses_follow_their_formulas(client: Client, prompt: list[int]) -> None:
    training = await client.new_model()
    sampler = await training.save_weights_and_get_sampling_client()
    sequence = (await sampled(sampler, prompt, max_tokens=6))[0]
    logprobs = list(sequence.logprobs or [])
    shifts = [0.0, 0.1, -0.1, 0.5, -0.5, 1.0]
    data = [policy_datum(prompt, sequence.tokens, [p - s for p, s in zip(logprobs, shifts, strict=True)], 2.0)]
    ratios = [math.exp(shift) for shift in shifts]

    async def loss(name: str, data: list[types.Datum], config: dict[str, float] | None = None) -> float:
        return (await training.forward(data, name, config)).metrics["loss:sum"]

    assert await loss("importance_sampling", data) == pytest.approx(-2 * sum(ratios), rel=1e-4)
    assert await loss("ppo", data) == pytest.approx(-2 * sum(min(ratio, 1.2) for ratio in ratios), rel=1e-4)
    clip = {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}
    assert await loss("ppo", data, clip) == pytest.approx(-2 * sum(min(ratio, 1.05) for ratio in ratios), rel=1e-4)
    mask = [0.0] * (len(prompt) - 1) + [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    masked = [policy_datum(prompt, sequence.tokens, [p - 0.1 for p in logprobs], 2.0, weights=mask)]
    assert await loss("importance_sampling", masked) == pytest.approx(-2 * 2 * math.exp(0.1), rel=1e-4)


async def test_imitation_lowers_the_loss(client: Client, prompt: list[int]) -> None:
    training = await client.new_model()
    losses = [await imitate(training, [text_datum(prompt)]) for _ in range(10)]
    assert losses[-1] < losses[0] / 4


async def test_gradients_add_up_until_a_step_and_forward_leaves_them_alone(client: Client, prompt: list[int]) -> None:
    data = [text_datum(prompt), text_datum(prompt[::-1] * 2)]
    whole, parts, idle = await client.new_model(), await client.new_model(), await client.new_model()
    before = await scores(whole, data)
    await imitate(whole, data)
    for datum in data:
        await parts.forward_backward([datum], "cross_entropy")
    await parts.optim_step(types.AdamParams(learning_rate=0.01))
    await idle.forward(data, "cross_entropy")
    await idle.optim_step(types.AdamParams(learning_rate=0.01))
    assert await scores(parts, data) == pytest.approx(await scores(whole, data), abs=1e-4)
    assert await scores(idle, data) == before
    assert await scores(whole, data) != pytest.approx(before, abs=1e-2)


async def test_a_step_takes_all_of_adams_parameters(client: Client, prompt: list[int]) -> None:
    data = [text_datum(prompt)]
    variants: list[dict[str, float]] = [
        {},
        {"beta1": 0.1},
        {"beta2": 0.5},
        {"eps": 1.0},
        {"eps": 1e-3},
        {"weight_decay": 0.5},
        {"grad_clip_norm": 1e-6, "eps": 1e-3},
    ]
    ends = []
    for variant in variants:
        training = await client.new_model()
        for _ in range(2):
            await imitate(training, data, **variant)
        ends.append(tuple(await scores(training, data)))
    assert len(set(ends)) == len(variants)


async def test_requests_of_many_data_are_split_and_joined_in_order(client: Client) -> None:
    training = await client.new_model()
    pairs = [[n % 400, n % 300] for n in range(1100)]
    whole = await training.forward_backward([text_datum(pair) for pair in pairs], "cross_entropy")
    assert len(whole.loss_fn_outputs) == 1100
    total = -sum(output["logprobs"].tolist()[0] for output in whole.loss_fn_outputs)
    assert whole.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
    for n in (0, 500, 1099):
        alone = await scores(training, [text_datum(pairs[n])])
        assert whole.loss_fn_outputs[n]["logprobs"].tolist() == pytest.approx(alone, abs=1e-4)


async def test_a_saved_state_brings_back_weights_and_optimizer(client: Client, prompt: list[int]) -> None:
    data = [text_datum(prompt)]
    training = await client.new_model(rank=4)
    for _ in range(3):
        await imitate(training, data)
    path = (await training.save_state("step_3")).path
    saved = await sampled(await training.save_weights_and_get_sampling_client(), prompt, 4, seed=5)
    await imitate(training, data)
    unbroken = await scores(training, data)

    resumed = await client.sdk.create_training_client_from_state_with_optimizer(path)
    fresh = await client.sdk.create_training_client_from_state(path)
    assert resumed.get_info().lora_rank == 4
    again = await sampled(await resumed.save_weights_and_get_sampling_client(), prompt, 4, seed=5)
    assert [(s.tokens, s.logprobs) for s in again] == [(s.tokens, s.logprobs) for s in saved]
    await imitate(resumed, data)
    await imitate(fresh, data)
    assert await scores(resumed, data) == unbroken
    assert await scores(fresh, data) != unbroken


@pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning")
async def test_a_state_can_be_loaded_into_a_model_in_training(client: Client, prompt: list[int]) -> None:
    data = [text_datum(prompt)]
    training = await client.new_model()
    await imitate(training, data)
    path = (await training.save_state("first")).path
    after_one = await scores(training, data)
    await imitate(training, data)
    await training.load_state_with_optimizer(path)
    assert await scores(training, data) == after_one


async def test_saved_weights_are_sampled_from_while_training_goes_on(client: Client, prompt: list[int]) -> None:
    training = await client.new_model()
    path = (await training.save_weights_for_sampler("first")).path
    kept = await training.save_weights_and_get_sampling_client()
    before = await sampled(kept, prompt, 3, seed=1)
    await imitate(training, [text_datum(prompt)])
    by_path = await client.sdk.create_sampling_client(model_path=path)
    base = await client.sdk.create_sampling_client(base_model=client.base_model)
    moved = await training.save_weights_and_get_sampling_client()
    for sampler in (kept, by_path, base):
        assert [s.logprobs for s in await sampled(sampler, prompt, 3, seed=1)] == [s.logprobs for s in before]
    assert [s.logprobs for s in await sampled(moved, prompt, 3, seed=1)] != [s.logprobs for s in before]
    assert by_path.get_base_model() == client.base_model


async def test_a_completion_ends_with_what_stops_it(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> None:
    end, word = tokenizer.eos_token_id, tokenizer.encode("repository")[0]
    async with client_of_new_service(tokenizer, model={"initial_bias": {end: 4.0, word: 4.0}}) as client:
        sampler = await client.base_sampler()
        by_default = await sampled(sampler, prompt, 8, max_tokens=200, stop=None)
        by_id = await sampled(sampler, prompt, 8, max_tokens=200, stop=[word])
        text = tokenizer.decode([word])
        by_text = await sampled(sampler, prompt, 8, max_tokens=200, stop=[text, "no such text"])
        never = await sampled(sampler, prompt, 8, max_tokens=200, stop=[])
    for group, last in ((by_default, end), (by_id, word)):
        assert all(s.stop_reason == "stop" and s.tokens.index(last) == len(s.tokens) - 1 for s in group)
        assert all(len(s.logprobs or []) == len(s.tokens) for s in group)
    assert all(s.stop_reason == "stop" and text in tokenizer.decode(s.tokens[-1:]) for s in by_text)
    assert all(text not in tokenizer.decode(s.tokens[:-1]) for s in by_text)
    assert all(s.stop_reason == "length" and len(s.tokens) == 200 for s in never)


async def test_samples_follow_the_distribution(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> None:
    async with client_of_new_service(tokenizer, model={"initial_bias": {7: 6.0, 8: 7.0, 9: 5.0}}) as client:
        sampler = await client.base_sampler()

        async def first_tokens(**params: float) -> tuple[Counter[int], dict[int, float]]:
            group = await sampled(sampler, prompt, 1500, max_tokens=1, **params)
            return Counter(s.tokens[0] for s in group), {s.tokens[0]: (s.logprobs or [])[0] for s in group}

        counts, logprobs = await first_tokens()
        for token in (7, 8, 9):
            assert counts[token] / 1500 == pytest.approx(math.exp(logprobs[token]), abs=0.04)
        hot, hot_logprobs = await first_tokens(temperature=2.0)
        assert hot_logprobs[8] == pytest.approx(logprobs[8], abs=1e-5)
        assert hot[8] / hot[7] == pytest.approx(math.exp((logprobs[8] - logprobs[7]) / 2), rel=0.2)
        likeliest = [token for token, _ in counts.most_common(2)]
        assert set((await first_tokens(temperature=0.0))[0]) == {likeliest[0]}
        assert set((await first_tokens(top_k=2))[0]) == set(likeliest)
        two = math.exp(logprobs[likeliest[0]]) + math.exp(logprobs[likeliest[1]])
        assert set((await first_tokens(top_p=two - 0.01))[0]) == set(likeliest)


async def test_the_same_seed_gives_the_same_samples_whatever_else_is_sampled(client: Client, prompt: list[int]) -> None:
    sampler = await client.base_sampler()
    alone = await sampled(sampler, prompt, 2, seed=11)
    others = [sampled(sampler, prompt * n, 3) for n in range(1, 6)]
    _, *_, beside = await asyncio.gather(*others, sampled(sampler, prompt, 2, seed=11))
    unseeded = [await sampled(sampler, prompt, 2) for _ in range(2)]
    assert [s.tokens for s in beside] == [s.tokens for s in alone]
    assert alone[0].tokens != alone[1].tokens
    assert unseeded[0][0].tokens != unseeded[1][0].tokens
    assert len({s.sequence_id for s in [*alone, *beside]}) == 4


async def test_a_service_of_the_same_seed_does_the_same(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> None:
    async def course(seed: int) -> list[list[int]]:
        async with client_of_new_service(tokenizer, model={"seed": seed}) as client:
            training = await client.new_model()
            await imitate(training, [text_datum(prompt)])
            return [s.tokens for s in await sampled(await training.save_weights_and_get_sampling_client(), prompt, 3)]

    first = await course(3)
    assert await course(3) == first
    assert await course(4) != first


async def test_the_service_describes_its_model(client: Client, tokenizer: PreTrainedTokenizerFast) -> None:
    training = await client.new_model(rank=16)
    info = training.get_info()
    assert (info.model_data.model_name, info.lora_rank) == (client.base_model, 16)
    assert training.get_tokenizer().get_vocab() == tokenizer.get_vocab()
    rest = await asyncio.to_thread(tinker.RestClient, base_url=client.base_url, api_key="tml-tests")
    capabilities = await rest.get_server_capabilities()
    assert [(m.model_name, m.max_context_length) for m in capabilities.supported_models] == [(client.base_model, 1024)]


async def test_no_thread_of_the_service_outlives_it(tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("tinker-service")]

    async with client_of_new_service(tokenizer) as client:
        await sampled(await client.base_sampler(), prompt)
        assert threads()
    assert not threads()


async def test_the_program_serves_until_it_is_told_to_end_and_keeps_checkpoints(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"layers": 1, "initial_bias": {"5": 1.0}}))
    data = [text_datum(tokenizer.encode("read the tests, find the bug and repair it"))]

    async def program() -> tuple[asyncio.subprocess.Process, str]:
        command = ["-m", "tests.tinker_service", "--model-folder", str(tmp_path), "--port", "0", "--seed", "3"]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), PATIENCE_S))
        assert ready["ready"] is True
        return process, f"http://127.0.0.1:{ready['port']}"

    async def end(process: asyncio.subprocess.Process) -> None:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0

    process, base_url = await program()
    try:
        async with connected(base_url, str(tmp_path)) as client:
            training = await client.new_model()
            await imitate(training, data)
            path, expected = (await training.save_state("kept")).path, await scores(training, data)
    finally:
        await end(process)
    process, base_url = await program()
    try:
        async with connected(base_url, str(tmp_path)) as client:
            resumed = await (await asyncio.to_thread(client.sdk.create_training_client_from_state, path))
            assert await scores(resumed, data) == expected
    finally:
        await end(process)
