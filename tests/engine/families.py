"""Model families with the special tokens that their tokenizers have, and their chat templates where these can be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "data" / "chat_templates"

CHATML = ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
LLAMA = (
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
DEEPSEEK = (
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
DEEPSEEK_V4 = (
    *DEEPSEEK[:4],
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
KIMI = (
    "<|im_end|>",
    "[EOS]",
    "[BOS]",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_pad|>",
    "<|media_end|>",
    "<|endoftext|>",
)
MISTRAL = (
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
    "[CALL_ID]",
    "[ARGS]",
    "[IMG]",
)
MINIMAX = ("[e~[", "]~!b[", "]~b]")
LAGUNA = ("〈|EOS|〉", "<assistant>", "</assistant>")
GEMMA = (
    "<eos>",
    "<bos>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|image>",
    "<|image|>",
    "<image|>",
    '<|"|>',
)
INKLING = (
    "<|endoftext|>",
    "<|message_user|>",
    "<|message_model|>",
    "<|message_system|>",
    "<|message_tool|>",
    "<|content_text|>",
    "<|content_thinking|>",
    "<|content_image|>",
    "<|content_audio_input|>",
    "<|content_xml|>",
    "<|content_invoke_tool_json|>",
    "<|content_invoke_tool_text|>",
    "<|end_message|>",
    "<|audio_end|>",
    "<|unused_200054|>",
    "<|unused_200053|>",
    "<|content_model_end_sampling|>",
)
HY3 = tuple(
    f"<｜{name}:opensource｜>" for name in ("hy_eos", "hy_begin_of_sentence", "hy_User", "hy_Assistant", "reasoning_mode")
)
THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")
RESPONSE = ("<tool_response>", "</tool_response>")
ARGUMENTS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HY3_TAGS = (
    "<tool_sep:opensource>",
    *(
        f"<{slash}{name}:opensource>"
        for name in ("think", "tool_calls", "tool_call", "tool_responses", "tool_response", "arg_key", "arg_value")
        for slash in ("", "/")
    ),
)


@dataclass(frozen=True)
class Family:
    """`special` tokens begin with the one that ends a turn; `tags` are added tokens that are not special to the tokenizer.

    `templates` are files by the template's name, none where no template can be had. `option` is what a user would configure;
    `renderer` is what that must lead to. `closing` is what the renderer puts between a truncated turn and its end, where the
    template has nothing. `rejects_malformed`: the template has no form for results that answer no call. `short_ids`: it wants
    ids of nine characters. `ended_by_role`: a turn ends with the token of whoever speaks next. `tools`: it shows tools.
    """

    name: str
    special: tuple[str, ...]
    renderer: str
    tags: tuple[str, ...] = ()
    bos: str | None = None
    templates: dict[str, str] = field(default_factory=dict)
    option: str = "auto"
    closing: tuple[str, ...] = ()
    rejects_malformed: bool = False
    short_ids: bool = False
    ended_by_role: bool = False
    tools: bool = True


def _published(name: str, special: tuple[str, ...], renderer: str, **options: Any) -> Family:
    return Family(name, special, renderer, templates={"default": f"{name}.jinja"}, **options)


def _by_option(renderer: str, special: tuple[str, ...], **options: Any) -> Family:
    return Family(renderer, special, renderer, option=renderer, **options)


LLAMA_BOS, DEEPSEEK_BOS = "<|begin_of_text|>", "<｜begin▁of▁sentence｜>"
QWEN_TAGS = (*CALL, *RESPONSE, *THINK)
MINIMAX_TAGS = (*THINK, "<minimax:tool_call>", "</minimax:tool_call>")
GLM_TAGS = (*QWEN_TAGS, *ARGUMENTS)

FAMILIES = (
    Family("qwen3", CHATML, "qwen3", QWEN_TAGS, templates={"default": "../qwen3_chat_template.jinja"}),
    # Hermes 3 has two templates: words alone, and with tools.
    Family(
        "hermes_3",
        (*CHATML, LLAMA_BOS),
        "derived",
        (*CALL, *RESPONSE),
        LLAMA_BOS,
        {"default": "hermes_3.jinja", "tool_use": "hermes_3_tool_use.jinja"},
    ),
    _published("hermes_4", CHATML, "derived", tags=QWEN_TAGS),
    # A tokenizer in which the tags of Hermes' calls are ordinary text.
    Family("hermes_4_spelled", CHATML, "derived", templates={"default": "hermes_4.jinja"}),
    _published("llama_3", LLAMA, "derived", bos=LLAMA_BOS, tools=False),
    _published("llama_3_1", LLAMA, "llama-3", bos=LLAMA_BOS),
    _published("llama_3_2", LLAMA, "derived", bos=LLAMA_BOS),
    _published("qwen2_5", CHATML, "derived", tags=CALL),
    _published("qwen3_5", CHATML, "qwen3.5", tags=(*QWEN_TAGS, *VISION)),
    _published("qwen3_coder", CHATML, "derived", tags=QWEN_TAGS),
    _published("qwq", CHATML, "derived", tags=QWEN_TAGS),
    _published("glm_4_6", GLM, "derived", tags=GLM_TAGS, ended_by_role=True),
    _published("glm_4_7_flash", GLM, "glm-5", tags=GLM_TAGS, ended_by_role=True, closing=("<|endoftext|>", "</think>")),
    _published("deepseek_v3", DEEPSEEK, "derived", bos=DEEPSEEK_BOS, tools=False),
    _published("deepseek_r1", DEEPSEEK, "derived", bos=DEEPSEEK_BOS, tools=False),
    _published("deepseek_v3_1", DEEPSEEK, "derived", tags=THINK, bos=DEEPSEEK_BOS, tools=False),
    _published("kimi_k2", KIMI, "derived", bos="[BOS]"),
    _published("minimax_m2", MINIMAX, "derived", tags=MINIMAX_TAGS, rejects_malformed=True),
    _published("nemotron_3_nano", CHATML, "nemotron-3", tags=(*QWEN_TAGS, "<image>")),
    _published("hy3", HY3, "hy3", tags=HY3_TAGS, rejects_malformed=True),
    _published("laguna_s_2_1", LAGUNA, "laguna-s-2.1", tags=(*CALL, *THINK), closing=("</think>",)),
    _published("laguna_xs_2_1", LAGUNA, "derived", tags=(*CALL, *THINK)),
    _published("laguna_xs_2", LAGUNA, "derived", tags=(*CALL, *THINK)),
    _published("mistral_nemo", MISTRAL, "derived", bos="<s>", rejects_malformed=True, short_ids=True),
    _published("mistral_small_3_2", MISTRAL, "derived", bos="<s>", rejects_malformed=True, short_ids=True),
    _published("granite_4", ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), "derived", tags=CALL),
    _published("gemma_4", GEMMA, "derived", bos="<bos>", tools=False),
    _published("phi_4", (*CHATML, "<|im_sep|>"), "derived", tools=False),
    _published("smollm3", CHATML, "derived", tags=QWEN_TAGS, tools=False),
    _by_option("prime-qwen3", CHATML, tags=QWEN_TAGS),
    _by_option("qwen3.6", CHATML, tags=(*QWEN_TAGS, *VISION)),
    _by_option("qwen3.8", CHATML, tags=(*QWEN_TAGS, *VISION)),
    _by_option("qwen3-vl", CHATML, tags=(*QWEN_TAGS, *VISION)),
    _by_option("glm-4.5", GLM, tags=GLM_TAGS, ended_by_role=True),
    _by_option("glm-5", GLM, tags=GLM_TAGS, ended_by_role=True),
    _by_option("glm-5.1", GLM, tags=GLM_TAGS, ended_by_role=True),
    _by_option("glm-5.3", GLM, tags=GLM_TAGS, ended_by_role=True),
    _by_option("llama-3", LLAMA, bos=LLAMA_BOS),
    _by_option("deepseek-v3", DEEPSEEK, bos=DEEPSEEK_BOS),
    _by_option("deepseek-r1", DEEPSEEK, bos=DEEPSEEK_BOS),
    _by_option("deepseek-v4", DEEPSEEK_V4, tags=THINK, bos=DEEPSEEK_BOS),
    _by_option("kimi-k2", KIMI, bos="[BOS]"),
    _by_option("kimi-k2.5", KIMI, bos="[BOS]"),
    _by_option("minimax-m2", MINIMAX, tags=MINIMAX_TAGS),
    _by_option("nemotron-3", CHATML, tags=(*QWEN_TAGS, "<image>")),
    _by_option("nemotron-3-ultra", CHATML, tags=(*QWEN_TAGS, "<image>")),
    _by_option("nemotron-3.5", CHATML, tags=(*QWEN_TAGS, "<image>")),
    _by_option("laguna-xs.2", LAGUNA, tags=(*CALL, *THINK)),
    _by_option("laguna-m.1", LAGUNA, tags=(*CALL, *THINK)),
    _by_option("laguna-xs-2.1", LAGUNA, tags=(*CALL, *THINK)),
    _by_option("gemma4", GEMMA, bos="<bos>"),
    _by_option("inkling", INKLING),
)
"""All but gpt-oss, whose renderer needs an encoding from the network. Qwen3 comes first: it is the default elsewhere."""
