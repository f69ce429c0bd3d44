"""What talks to a fake engine: the configs of its endpoints and the policy that asks it."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.base import TokensOptions
from hermes_envs.policies.tokens import TokensPolicy
from tests.engine.engine import Engine


def servers_at(*base_urls: str, server_type: str, timeout_s: int = 30, health_check: bool = False) -> list[APIServerConfig]:
    """As an environment gets them from its command line. The Tinker trainer's engine is of type sglang."""
    return [
        APIServerConfig(
            server_type="sglang" if server_type == "tinker" else server_type,
            base_url=base_url,
            api_key="x",
            model_name="tiny",
            timeout=timeout_s,
            health_check=health_check,
        )
        for base_url in base_urls
    ]


def policy_for(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, *, timeout_s: int = 30, health_check: bool = False, **options: Any
) -> TokensPolicy:
    """A policy that is closed with the engine, with turns of at most 60 tokens unless `options` say otherwise."""
    servers = servers_at(engine.base_url, server_type=engine.dialect, timeout_s=timeout_s, health_check=health_check)
    policy = TokensPolicy(servers, tokenizer, TokensOptions(**{"agent_max_tokens": 60} | options))
    engine.before_exit(policy.aclose)
    return policy
