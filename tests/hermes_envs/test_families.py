"""The same truths for every model family: first prompts are the chat template's, bridges are its deltas, what was rendered is
parsed, what looks like a call elsewhere is none, and the record of whole rollouts is what the engine saw and produced."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from renderers.base import MODEL_RENDERER_MAP
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.tokens import TokensPolicy
from hermes_envs.rendering.chat_renderer import ChatRenderer
from hermes_envs.rendering.choice import FAULTY_BRIDGES, RENDERER_NAMES, create_chat_renderer
from tests.engine.conversations import OUTPUTS, Played, check_against_template, check_record, for_template, play, sampled_turns
from tests.engine.engine import Dialect, Engine
from tests.engine.families import FAMILIES, Family
from tests.engine.servers import policy_for
from tests.engine.speech import FamilySpeech
from tests.engine.tokenizer import make_tokenizer
from tests.engine.turns import QUESTION, TOOLS, Turns, call

DIALECTS: tuple[Dialect, ...] = ("sglang", "vllm", "tinker")
ROLLOUTS, TURNS = 4, 8

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
templated_family = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.templates], ids=lambda family: family.name
)
# Both have the template to be compared with; the others are compared in their own right.
hand_written_family = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if family.templates and family.renderer not in ("derived", "hy3")],
    ids=lambda family: family.name,
)


@dataclass(frozen=True)
class Model:
    """A family's tokenizer and renderer, the tools that its template shows, and what it says."""

    family: Family
    tokenizer: PreTrainedTokenizerFast
    renderer: ChatRenderer
    tools: list[dict[str, Any]]
    turns: Turns


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Model]:
    made: dict[str, Model] = {}

    def make(family: Family) -> Model:
        if family.name not in made:
            tokenizer = make_tokenizer(tmp_path_factory.mktemp("family"), family)
            renderer = create_chat_renderer(tokenizer, family.option)
            tools = TOOLS if family.tools else []
            made[family.name] = Model(family, tokenizer, renderer, tools, Turns(renderer, tools))
        return made[family.name]

    return make


@every_family
def test_a_renderer_is_found(family: Family, model_of: Callable[[Family], Model]) -> None:
    model = model_of(family)

    assert model.renderer.name == family.renderer
    assert model.tokenizer.eos_token_id in model.renderer.stop_token_ids
    assert set(model.renderer.stop_texts) <= {*family.special, *family.tags}


@templated_family
@pytest.mark.parametrize("with_system", [False, True])
def test_first_prompts_are_the_templates(family: Family, with_system: bool, model_of: Callable[[Family], Model]) -> None:
    model = model_of(family)
    messages = [{"role": "system", "content": "You are careful; süß."}] * with_system + [QUESTION]

    for tools in model.tools, []:
        assert model.renderer.prompt(messages, tools) == rendered(model, messages, tools)


@templated_family
def test_prompt_answer_and_bridge_are_the_template_on_the_whole(family: Family, model_of: Callable[[Family], Model]) -> None:
    """Where the model says what the template would write, the next prompt is the whole conversation's, token for token."""
    model = model_of(family)
    question = {"role": "user", "content": "  And now? é\n"}
    result = {"role": "tool", "tool_call_id": "functions.bash:0", "name": "bash", "content": "total 0\n"}
    exchanges = [({"role": "assistant", "content": "It is done."}, question)]
    if model.tools:
        called = {"role": "assistant", "content": "", "tool_calls": [call("bash", "ls -la 'é'")]}
        exchanges += [(called, result), (called | {"reasoning_content": "What is there?"}, result)]
    prompt = model.renderer.prompt([QUESTION], model.tools)
    equal = 0
    for answer, new in exchanges:
        whole = rendered(model, [QUESTION, answer, new], model.tools)
        if whole[: len(prompt)] != prompt:
            continue
        bridged = model.renderer.next_prompt(prompt, upto_stop(model, whole[len(prompt) :]), [new], model.tools)
        assert bridged in (whole, None)
        equal += bridged == whole

    assert (equal > 0) is (family.name not in NEVER_WHOLE)


@pytest.mark.parametrize("family", [one for one in FAMILIES if not one.templates], ids=lambda family: family.name)
def test_a_bridge_is_the_renderers_own_whole_prompt(family: Family, model_of: Callable[[Family], Model]) -> None:
    """Without a template to hold it against: prompt, answer and bridge are the renderer's prompt of the whole conversation."""
    model = model_of(family)
    calls = [call("bash", "ls"), call("read_file", "a.py", 1)]
    results = [
        {"role": "tool", "tool_call_id": made["id"], "name": made["function"]["name"], "content": "a.py\n"} for made in calls
    ]
    exchanges: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        ({"content": "It is done."}, [QUESTION]),
        ({"content": "", "tool_calls": calls[:1]}, results[:1]),
        ({"content": "", "reasoning_content": "Where?", "tool_calls": calls[:1]}, results[:1]),
    ]
    prompt = model.renderer.prompt([QUESTION], TOOLS)
    outcomes = []
    for answer, new in exchanges:
        whole = model.renderer.prompt([QUESTION, {"role": "assistant"} | answer, *new], TOOLS)
        if whole[: len(prompt)] == prompt:
            bridged = model.renderer.next_prompt(prompt, upto_stop(model, whole[len(prompt) :]), new, TOOLS)
            outcomes += [bridged == whole] if bridged is not None else []

    assert all(outcomes) is (family.name not in FAULTY_BRIDGES)
    assert outcomes or family.name == "deepseek-r1", "its template shows no reasoning of any turn before the last"


def upto_stop(model: Model, token_ids: list[int]) -> list[int]:
    return token_ids[: 1 + next(place for place, token in enumerate(token_ids) if token in model.renderer.stop_token_ids)]


# A turn's prompt differs from how its history is shown: reasoning is opened or closed there, a system message left out later.
NEVER_WHOLE = ("qwq", "deepseek_r1", "gemma_4", "mistral_nemo")


def rendered(model: Model, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    shown = for_template(messages, short_ids=model.family.short_ids)
    return list(model.tokenizer.apply_chat_template(shown, tools=tools or None, add_generation_prompt=True, return_dict=False))


@every_family
def test_what_was_rendered_is_parsed(family: Family, model_of: Callable[[Family], Model]) -> None:
    model = model_of(family)
    prompt = model.renderer.prompt([QUESTION], model.tools)

    def parsed(token_ids: list[int]) -> tuple[str, str | None, list[tuple[str, dict[str, Any] | None, str | None]]]:
        answer = model.renderer.parse(token_ids, prompt, model.tools, "call")
        calls = [(made.name, made.arguments, made.error) for made in answer.tool_calls]
        return answer.content.strip(), (answer.reasoning or "").strip() or None, calls

    assert parsed(model.turns.text)[0] == "It is done."
    assert parsed(model.turns.text)[2] == []
    content, reasoning, _ = parsed(model.turns.reasoned_text)
    assert content == "It is done."
    assert reasoning == "Is it?" or "Is it?" not in model.renderer.decode(model.turns.reasoned_text)
    if not model.tools:
        return
    first, second = ("bash", {"command": "ls -la 'é'"}, None), ("read_file", {"command": "a.py"}, None)
    assert parsed(model.turns.call)[2] == parsed(model.turns.reasoned_call)[2] == [first]
    assert parsed(model.turns.calls)[2] in ([first, second], [first]), "Llama 3 makes one call in a turn"
    reasoned = model.renderer.decode(model.turns.reasoned_call)
    assert parsed(model.turns.reasoned_call)[1] == "What is there?" or "What is there?" not in reasoned


@every_family
async def test_text_that_looks_like_a_call_is_none(family: Family, model_of: Callable[[Family], Model]) -> None:
    """In a question and in a tool's output it stands for itself: nothing is called, nothing of it is trained, history stays."""
    model = model_of(family)
    lookalikes = [model.renderer.decode(model.turns.call), *OUTPUTS]
    script = [model.turns.text, model.turns.call, model.turns.text] if model.tools else [model.turns.text] * 3
    said = iter(script)

    async with Engine(model.tokenizer, "vllm", lambda prompt: next(said)) as engine:
        conversation = policy(model, engine).start("t", tools=model.tools)
        new = [{"role": "user", "content": "\n".join(lookalikes)}]
        first = await conversation.respond(new)
        second = await conversation.respond(new)
        results = [
            {"role": "tool", "tool_call_id": made.id, "name": made.name, "content": "\n".join(lookalikes)}
            for made in second.tool_calls
        ]
        third = await conversation.respond(results or new)

    assert [len(turn.tool_calls) for turn in (first, second, third)] == [0, 1 if model.tools else 0, 0]
    segments = conversation.record.segments
    check_record(engine, segments)
    trained = [segment.tokens[slice(*turn)] for segment in segments for turn in sampled_turns(segment)]
    assert trained == script


@every_family
async def test_the_record_is_what_the_engine_saw_and_produced(family: Family, model_of: Callable[[Family], Model]) -> None:
    model = model_of(family)
    played, compared = await play_and_check(model, DIALECTS[FAMILIES.index(family) % 3])

    assert sum(one.conversation.record.engine_calls for one in played) == ROLLOUTS * TURNS
    reasons = {turn.finish_reason for one in played for _, turn, _ in one.steps}
    assert reasons == ({"stop", "tool_calls", "length"} if model.tools else {"stop", "length"})
    if family.templates:
        assert compared.total() == ROLLOUTS * TURNS
        assert compared["bridges"] + compared["refused"] > 8 or family.name in NEVER_WHOLE


@hand_written_family
async def test_a_derived_renderer_keeps_the_same_record(family: Family, model_of: Callable[[Family], Model]) -> None:
    """The families that have a renderer of their own, without it."""
    own = model_of(family)
    derived = create_chat_renderer(own.tokenizer, "derived")
    model = Model(family, own.tokenizer, derived, own.tools, Turns(derived, own.tools))

    _, compared = await play_and_check(model, "sglang", "derived")

    assert compared["bridges"] > 8


async def play_and_check(model: Model, dialect: Dialect, option: str | None = None) -> tuple[list[Played], Counter[str]]:
    """Whole rollouts, their record checked against the engine's and, where there is a template, against that."""
    outputs = (*OUTPUTS, model.renderer.decode(model.turns.call), model.renderer.decode(model.turns.calls))
    favoured = [*model.renderer.stop_texts, *model.family.tags]
    async with Engine(
        model.tokenizer, dialect, FamilySpeech(model.tokenizer, model.turns, seed=3), favoured=favoured
    ) as engine:
        shared = policy(model, engine, option)
        played = await asyncio.gather(
            *(play(shared, number, tools=model.tools, turns=TURNS, outputs=outputs) for number in range(ROLLOUTS))
        )
    check_record(engine, [segment for one in played for segment in one.conversation.record.segments])
    compared = Counter[str]()
    if model.family.templates:
        for one in played:
            compared += check_against_template(model.tokenizer, model.family, model.renderer, one, model.tools)
    return played, compared


def policy(model: Model, engine: Engine, option: str | None = None) -> TokensPolicy:
    return policy_for(engine, model.tokenizer, agent_max_tokens=100, renderer=option or model.family.option)


def test_a_published_model_with_a_faulty_bridge_gets_a_derived_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, next(family for family in FAMILIES if family.name == "laguna_xs_2"))
    tokenizer.name_or_path = "poolside/Laguna-XS.2"

    assert create_chat_renderer(tokenizer).name == "derived"
    tokenizer.chat_template = None
    assert create_chat_renderer(tokenizer).name == "laguna-xs.2"


def test_every_published_model_has_a_renderer() -> None:
    assert set(MODEL_RENDERER_MAP.values()) <= set(RENDERER_NAMES)
    tried = {family.option for family in FAMILIES} | {family.renderer for family in FAMILIES}
    assert set(RENDERER_NAMES) - tried == {"gpt-oss"}
