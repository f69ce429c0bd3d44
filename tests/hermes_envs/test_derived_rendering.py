"""The renderer that is derived from a chat template: calls and reasoning as Hermes and others write them, where a turn ends,
when history is rewritten, and what cannot work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hermes_envs.errors import ConfigError, EngineError
from hermes_envs.rendering.chat_renderer import ChatRenderer, ParsedAnswer
from hermes_envs.rendering.choice import create_chat_renderer
from tests.engine.families import CHATML, FAMILIES, LLAMA, TEMPLATES, Family
from tests.engine.tokenizer import TEXT, byte_tokens, make_tokenizer, token_ids
from tests.engine.turns import QUESTION, TOOLS, call

BY_NAME = {family.name: family for family in FAMILIES}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "functions.bash:0", "name": "bash", "content": "a.py"}
GOOD = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedTokenizerFast]:
    made: dict[str, PreTrainedTokenizerFast] = {}

    def make(name: str) -> PreTrainedTokenizerFast:
        if name not in made:
            made[name] = make_tokenizer(tmp_path_factory.mktemp("family"), BY_NAME[name])
        return made[name]

    return make


def with_template(tmp_path: Path, template: object, special: tuple[str, ...] = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(tmp_path, Family("made up", special, "derived"))
    tokenizer.chat_template = template
    return tokenizer


def parse(renderer: ChatRenderer, text: str | list[int]) -> ParsedAnswer:
    said = renderer.encode(text) if isinstance(text, str) else text
    return renderer.parse(said, renderer.prompt([QUESTION], TOOLS), TOOLS, "call_1")


# Hermes 3's tags are tokens of their own; in the other tokenizer they are ordinary text.
hermes = pytest.mark.parametrize("name", ["hermes_3", "hermes_4", "hermes_4_spelled"])


@hermes
def test_one_bad_call_does_not_hide_the_good_ones(name: str, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    renderer = create_chat_renderer(tokenizer_of(name))
    deep = "[" * 20_000
    bad = ['{"name": "bash", "arguments": {"command": ', '{"arguments": {}}', "ls -la", "[1]", '{"name": 5}', deep]

    for written in bad:
        answer = parse(renderer, f"I look.\n{GOOD}\n<tool_call>\n{written}\n</tool_call>\n{GOOD}<|im_end|>")
        first, second, third = answer.tool_calls
        assert answer.content == "I look."
        assert (first.name, first.arguments, first.error) == ("bash", {"command": "ls"}, None)
        assert second.error
        assert (third.name, third.arguments, third.error) == ("bash", {"command": "ls"}, None)
        assert [made.id for made in answer.tool_calls] == ["call_1_0", "call_1_1", "call_1_2"]


@hermes
def test_an_unclosed_call_is_one_and_is_told_so(name: str, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    renderer = create_chat_renderer(tokenizer_of(name))

    good, unclosed = parse(renderer, GOOD + '\n<tool_call>\n{"name": "bash", "arguments": {}}<|im_end|>').tool_calls

    assert good.error is None
    assert unclosed.error == "the tool call was not closed before the answer ended"


@hermes
def test_a_call_in_single_bytes_is_a_call(name: str, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizer_of(name)
    renderer = create_chat_renderer(tokenizer)
    body = byte_tokens(tokenizer, '\n{"name": "bash", "arguments": {"command": "ls ä"}}\n'.encode())
    opening, closing = renderer.encode("<tool_call>"), renderer.encode("</tool_call>")

    (made,) = parse(renderer, [*opening, *body, *closing, *renderer.encode("<|im_end|>")]).tool_calls

    assert made.arguments == {"command": "ls ä"}


def test_a_tag_that_is_a_token_counts_as_that_token_alone(tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    spelled = {name: byte_tokens(tokenizer_of(name), GOOD.encode()) for name in ("hermes_4", "hermes_4_spelled")}

    found = {name: len(parse(create_chat_renderer(tokenizer_of(name)), said).tool_calls) for name, said in spelled.items()}

    assert found == {"hermes_4": 0, "hermes_4_spelled": 1}


@hermes
def test_reasoning_comes_first_or_not_at_all(name: str, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    renderer = create_chat_renderer(tokenizer_of(name))

    def read(text: str) -> tuple[str, str | None, int]:
        answer = parse(renderer, text)
        return answer.content, answer.reasoning, len(answer.tool_calls)

    assert read(f"<think>\nWhat? {GOOD}\n</think>\n\nThis: {GOOD}<|im_end|>") == ("This:", f"What? {GOOD}", 1)
    assert read(f"<think>\nWhat? {GOOD}<|im_end|>") == ("", "What?", 1), "a call ends reasoning that nothing else ends"
    assert read("<think>\nhmm, hmm") == ("", "hmm, hmm", 0)
    assert read("so it is.\n</think>\n\nYes.<|im_end|>") == ("so it is.\n</think>\n\nYes.", None, 0)
    assert read(f"The tag <think> begins it. {GOOD}<|im_end|>") == ("The tag <think> begins it.", None, 1)
    assert read("<|im_end|>") == ("", None, 0)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "mistral_nemo",
            '[TOOL_CALLS][{"name": "bash", "arguments": {"command": "ls"}, "id": 5}, {"name": 1}]</s>',
            [True, False],
        ),
        ("mistral_nemo", "[TOOL_CALLS]bash it</s>", [False]),
        ("mistral_nemo", "[TOOL_CALLS]{}</s>", [False]),
        ("mistral_small_3_2", '[TOOL_CALLS]bash[ARGS]{"command": "ls"}[TOOL_CALLS]bash[ARGS]{"comm</s>', [True, False]),
        ("mistral_small_3_2", '[TOOL_CALLS]bash[CALL_ID]123456789[ARGS]{"command": "ls"}</s>', [True]),
        ("llama_3_2", '<|python_tag|>{"name": "bash", "parameters": {"command": "ls"}}<|eot_id|>', [True]),
        ("llama_3_2", '{"name": "bash", "parameters": {"comm<|eot_id|>', []),
    ],
)
def test_other_forms_of_calls(
    name: str, text: str, expected: list[bool], tokenizer_of: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    renderer = create_chat_renderer(tokenizer_of(name))

    calls = parse(renderer, text).tool_calls

    assert [made.error is None for made in calls] == expected
    assert all((made.name, made.arguments) == ("bash", {"command": "ls"}) for made in calls if made.error is None)
    assert all(isinstance(made.id, str) for made in calls)


def test_deepseek_v3_1s_calls_are_read(tmp_path: Path) -> None:
    """Its template shows no tools; where one does, its calls are these."""
    family = BY_NAME["deepseek_v3_1"]
    tokenizer = make_tokenizer(tmp_path, family)
    shown = (TEMPLATES / "deepseek_v3_1.jinja").read_text()
    tokenizer.chat_template = shown.replace("{{ ns.system_prompt }}", "{{ ns.system_prompt }}{{ tools }}")
    renderer = create_chat_renderer(tokenizer)
    one = '<｜tool▁call▁begin｜>bash<｜tool▁sep｜>{"command": "ls"}<｜tool▁call▁end｜>'

    def read(text: str) -> list[bool]:
        return [made.error is None for made in parse(renderer, text).tool_calls]

    assert parse(renderer, f"I look.<｜tool▁calls▁begin｜>{one}<｜tool▁calls▁end｜>").content == "I look."
    assert read(f"<｜tool▁calls▁begin｜>{one}{one}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>") == [True, True]
    assert read(f"<｜tool▁calls▁begin｜>{one}<｜tool▁call▁begin｜>bash<｜tool▁sep｜>ls<｜tool▁call▁end｜>") == [True, False]
    assert read("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>bash<｜tool▁call▁end｜>") == [False]
    assert read("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>bash<｜tool▁sep｜>{") == [False]


def test_a_truncated_turn_is_closed_and_another_stop_token_stays(
    tokenizer_of: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizer_of("hermes_4")
    renderer = create_chat_renderer(tokenizer, "derived")
    prompt = renderer.prompt([QUESTION], TOOLS)
    end, other = token_ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    said = renderer.encode("value value")

    truncated = renderer.next_prompt(prompt, said, [QUESTION], TOOLS)
    ended = renderer.next_prompt(prompt, [*said, end], [QUESTION], TOOLS)

    assert truncated == ended
    assert truncated is not None
    assert renderer.decode(truncated[len(prompt) + len(said) :]).startswith("<|im_end|>\n<|im_start|>user\n")
    assert other not in renderer.stop_token_ids


def test_stop_tokens_of_the_generation_config_are_known(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, BY_NAME["llama_3_2"])
    expected = token_ids(tokenizer, "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

    assert create_chat_renderer(tokenizer, "derived").stop_token_ids == (expected[0],)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": expected[1:]}))
    renderer = create_chat_renderer(tokenizer, "derived")
    assert renderer.stop_token_ids == tuple(expected)

    prompt, said = renderer.prompt([QUESTION], TOOLS), [*renderer.encode("It is."), expected[1]]
    bridged = renderer.next_prompt(prompt, said, [QUESTION], TOOLS)
    assert bridged is not None
    assert bridged[: len(prompt) + len(said)] == [*prompt, *said]
    assert bridged[len(prompt) + len(said)] == token_ids(tokenizer, "<|start_header_id|>")[0], "the turn is ended once"


def test_end_tokens_that_the_tokenizer_does_not_have_end_nothing(tmp_path: Path) -> None:
    """An empty text in `stop` would stop an engine at once, and make every turn look ended."""
    tokenizer = make_tokenizer(tmp_path, BY_NAME["hermes_3"])
    known = create_chat_renderer(tokenizer, "derived").stop_token_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [len(tokenizer), 10**6, -1, None]}))

    renderer = create_chat_renderer(tokenizer, "derived")

    assert renderer.stop_token_ids == known
    assert all(renderer.stop_texts)


@pytest.mark.parametrize("content", ["{oops", "[]", "7"])
@pytest.mark.parametrize("name", ["auto", "derived"])
def test_a_broken_generation_config_is_named(tmp_path: Path, name: str, content: str) -> None:
    tokenizer = make_tokenizer(tmp_path, BY_NAME["hermes_3"])
    (tmp_path / "generation_config.json").write_text(content)
    if content == "[]":
        # An empty list of pairs: nothing that ends a turn, and nothing wrong.
        create_chat_renderer(tokenizer, name)
    else:
        with pytest.raises(ConfigError, match=r"generation_config\.json is no generation config"):
            create_chat_renderer(tokenizer, name)


def test_a_published_name_counts_for_less_than_the_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen's thinking models of July 2025 have Qwen3's name and renderer, but open the reasoning in the prompt."""
    tokenizer = make_tokenizer(tmp_path, BY_NAME["qwen3"])
    tokenizer.name_or_path = "Qwen/Qwen3-4B-Thinking-2507"
    assert create_chat_renderer(tokenizer).name == "qwen3"

    template = str(tokenizer.chat_template)
    opening = "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking"
    assert template.count(opening) == 1
    tokenizer.chat_template = template.replace(opening, opening.replace("\\n' }}", "\\n<think>\\n' }}"))
    renderer = create_chat_renderer(tokenizer)
    assert renderer.name == "derived"
    assert renderer.decode(renderer.prompt([QUESTION], TOOLS)).endswith("<|im_start|>assistant\n<think>\n")
    answer = parse(renderer, "3? No.\n</think>\n\nDone.<|im_end|>")
    assert (answer.reasoning, answer.content) == ("3? No.", "Done.")

    # Named, it is used, for there are tokenizers with a wrong template; but not without a word.
    assert not caplog.records
    assert create_chat_renderer(tokenizer, "qwen3").name == "qwen3"
    assert "'qwen3' writes other prompts than the chat template" in caplog.text


def test_where_the_next_role_ends_a_turn_another_stop_token_cannot(
    tokenizer_of: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizer_of("glm_4_6")
    renderer = create_chat_renderer(tokenizer)
    assert renderer.stop_texts == ("<|user|>", "<|observation|>", "<|endoftext|>")
    prompt, said = renderer.prompt([QUESTION], TOOLS), renderer.encode("It is.")
    user, observation, end = renderer.stop_token_ids

    assert renderer.next_prompt(prompt, [*said, user], [QUESTION], TOOLS) is not None
    assert renderer.next_prompt(prompt, [*said, observation], [RESULT], TOOLS) is not None
    assert renderer.next_prompt(prompt, [*said, observation], [QUESTION], TOOLS) is None
    assert renderer.next_prompt(prompt, [*said, end], [QUESTION], TOOLS) is None


@pytest.mark.parametrize(
    ("name", "text", "new", "kept"),
    [
        ("hermes_4", "It is.", QUESTION, True),
        ("hermes_4", "<think>\nIs it?\n</think>\n\nIt is.", QUESTION, False),
        ("hermes_4", f"<think>\nIs it?\n</think>\n\n{GOOD}", RESULT, False),
        ("hermes_4", GOOD, RESULT, True),
        ("qwen3", f"<think>\nIs it?\n</think>\n\n{GOOD}", RESULT, True),
        ("qwen3", "<think>\nIs it?\n</think>\n\nIt is.", QUESTION, False),
        ("qwen3", "It is.", QUESTION, True),
        ("qwen2_5", "<think>\nIs it?\n</think>\n\nIt is.", QUESTION, True),
        ("qwq", f"Is it?\n</think>\n\n{GOOD}", RESULT, False),
        ("mistral_nemo", "It is.", QUESTION, False),
        ("mistral_nemo", '[TOOL_CALLS][{"name": "bash", "arguments": {"command": "ls"}, "id": "123456789"}]', RESULT, False),
        ("mistral_small_3_2", '[TOOL_CALLS]bash[ARGS]{"command": "ls"}', RESULT, True),
        ("mistral_small_3_2", "It is.", QUESTION, False),
    ],
)
def test_a_template_that_rewrites_history_is_not_bridged(
    name: str, text: str, new: dict[str, Any], kept: bool, tokenizer_of: Callable[[str], PreTrainedTokenizerFast]
) -> None:
    renderer = create_chat_renderer(tokenizer_of(name), "derived")
    prompt = renderer.prompt([QUESTION], TOOLS)
    said = [*renderer.encode(text), renderer.stop_token_ids[0]]

    assert (renderer.next_prompt(prompt, said, [new], TOOLS) is not None) is kept


def test_whitespace_that_a_template_moves_is_no_history(tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    """Hermes 3's template ends the last tool response without the newline that it has in any other."""
    tokenizer = tokenizer_of("hermes_3")
    renderer = create_chat_renderer(tokenizer)
    ids = renderer.prompt([QUESTION], TOOLS)
    for _ in range(3):
        said = renderer.encode(GOOD + "<|im_end|>")
        bridged = renderer.next_prompt(ids, said, [RESULT], TOOLS)
        assert bridged is not None
        assert bridged[: len(ids) + len(said)] == [*ids, *said]
        ids = bridged

    made = {"role": "assistant", "content": "", "tool_calls": [call("bash", "ls")]}
    whole = renderer.decode(renderer.prompt([QUESTION, made, RESULT, made, RESULT, made, RESULT], TOOLS))
    assert renderer.decode(ids) == whole.replace("</tool_response>\n<|im_end|>", "</tool_response><|im_end|>")


def test_a_template_that_drops_new_messages_is_not_bridged(tmp_path: Path) -> None:
    shown = (TEMPLATES / "hermes_4.jinja").read_text()
    dropped = with_template(tmp_path, shown.replace("message.role == 'tool'", "message.role == 'nobody'"))

    for tokenizer, expected in ((with_template(tmp_path, shown), True), (dropped, False)):
        renderer = create_chat_renderer(tokenizer, "derived")
        prompt, said = renderer.prompt([QUESTION], TOOLS), renderer.encode(GOOD + "<|im_end|>")
        assert (renderer.next_prompt(prompt, said, [RESULT], TOOLS) is not None) is expected


def test_reasoning_that_a_message_quotes_is_not_the_models(tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    renderer = create_chat_renderer(tokenizer_of("hermes_4"))
    quoted = {"role": "user", "content": "Think between <think> and </think>."}

    def bridged(text: str) -> bool:
        prompt = renderer.prompt([quoted], TOOLS)
        return renderer.next_prompt(prompt, renderer.encode(text + "<|im_end|>"), [quoted], TOOLS) is not None

    assert bridged("It is.")
    assert not bridged("<think>\n\n</think>\n\nIt is.")


def test_text_after_a_boundary_does_not_merge_with_what_was_said(tmp_path: Path) -> None:
    """In a tokenizer that puts a blank before the first word of a text, as Llama 2's does."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({*TEXT, "▁", "\n", "|", "<", ">"})
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False))
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHATML])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = (TEMPLATES / "hermes_4.jinja").read_text()
    renderer = create_chat_renderer(tokenizer, "derived")
    asked = {"role": "user", "content": "list the files"}
    whole = renderer.prompt([asked, {"role": "assistant", "content": "function"}, asked], [])
    prompt = renderer.prompt([asked], [])
    said = whole[len(prompt) : whole.index(renderer.stop_token_ids[0], len(prompt)) + 1]

    assert whole[: len(prompt)] == prompt
    assert renderer.next_prompt(prompt, said, [asked], []) == whole


def test_tokenizers_and_templates_that_cannot_work_are_named(tmp_path: Path) -> None:
    chatml = (TEMPLATES / "hermes_3.jinja").read_text()

    def refusal(tokenizer: PreTrainedTokenizerFast, name: str = "auto", tools: Any = ()) -> str:
        with pytest.raises(ConfigError, match=r"^renderer: ") as raised:
            create_chat_renderer(tokenizer, name).prompt([QUESTION], tools)
        return str(raised.value)

    assert "has no chat template" in refusal(with_template(tmp_path, None))
    assert "has no chat template" in refusal(with_template(tmp_path, None), "derived")
    assert "'glm-5' does not suit" in refusal(with_template(tmp_path, chatml), "glm-5")
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    assert "does not end an assistant's turn with a special token, but with '\\nuser: " in refusal(
        with_template(tmp_path, plain)
    )
    assert "cannot render a conversation" in refusal(with_template(tmp_path, "{{ raise_exception('no') }}"))
    assert "does not show tools" in refusal(with_template(tmp_path, chatml), tools=TOOLS)
    unknown = chatml + "{{ tools }}"
    assert "tool calls of" in refusal(with_template(tmp_path, unknown), tools=TOOLS)
    channels = chatml.replace("+ message['content']", "+ '<|channel|>final<|message|>' + message['content']")
    assert "they begin with '<|channel|>final<|message|>'" in refusal(with_template(tmp_path, channels))


def test_gpt_oss_says_that_it_needs_its_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path / "nothing"))
    tokenizer = make_tokenizer(tmp_path, Family("gpt_oss", ("<|return|>", "<|start|>"), "gpt-oss"))
    tokenizer.name_or_path = "openai/gpt-oss-20b"

    for name in "auto", "gpt-oss":
        with pytest.raises(ConfigError, match=r"o200k_base.*TIKTOKEN_ENCODINGS_BASE"):
            create_chat_renderer(tokenizer, name)


def test_what_a_model_said_may_be_refused_without_stopping_a_run(
    tokenizer_of: Callable[[str], PreTrainedTokenizerFast],
) -> None:
    """Results that answer no call are shown as a question, where a template refuses them; what still fails is no reward."""
    renderer = create_chat_renderer(tokenizer_of("mistral_nemo"))
    words = {"role": "assistant", "content": "[TOOL_CALLS]bash it"}
    conversation = [QUESTION, words, RESULT, RESULT | {"content": "b.py"}, words, QUESTION]

    shown = renderer.decode(renderer.prompt(conversation, TOOLS))

    assert "[INST]a.py\nb.py[/INST]" in shown
    with pytest.raises(EngineError, match="cannot render the conversation"):
        renderer.prompt([QUESTION, QUESTION, words], TOOLS)
    with pytest.raises(ConfigError, match="cannot render the conversation"):
        renderer.prompt([QUESTION, QUESTION], TOOLS)


def test_llama_3_writes_one_call_in_a_turn(tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    renderer = create_chat_renderer(tokenizer_of("llama_3_2"))
    two = {"role": "assistant", "content": "", "tool_calls": [call("bash", "ls"), call("bash", "ls", 1)]}

    with pytest.raises(EngineError, match="single tool-calls"):
        renderer.prompt([QUESTION, two, RESULT], TOOLS)
    assert set(renderer.stop_texts) <= set(LLAMA)
