"""What talks to a fake engine: atroposlib's servers and the policy behind them."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from transformers import PreTrainedTokenizerFast

from hermes_envs.policies.base import TokensOptions
from hermes_envs.policies.token_servers import exact_server_class
from hermes_envs.policies.tokens import TokensPolicy
from tests.engine.engine import Engine


def server_manager(
    tokenizer: PreTrainedTokenizerFast, *base_urls: str, server_type: str, timeout_s: int = 30, health_check: bool = False
) -> ServerManager:
    """As an environment gets it from its command line. The Tinker trainer's engine is of type sglang."""
    configs = [
        APIServerConfig(
            server_type="sglang" if server_type == "tinker" else server_type,
            base_url=base_url,
            api_key="x",
            model_name="tiny",
            tokenizer_name=tokenizer.name_or_path,
            timeout=timeout_s,
            health_check=health_check,
        )
        for base_url in base_urls
    ]
    return ServerManager(configs, server_class=APIServer if server_type == "openai" else exact_server_class(configs))


def policy_for(engine: Engine, tokenizer: PreTrainedTokenizerFast, *, timeout_s: int = 30, **options: Any) -> TokensPolicy:
    """A policy with turns of at most 60 tokens unless `options` say otherwise."""
    server = server_manager(tokenizer, engine.base_url, server_type=engine.dialect, timeout_s=timeout_s)
    return TokensPolicy(server, tokenizer, TokensOptions(**{"agent_max_tokens": 60} | options))
