"""atroposlib's servers for a fake engine."""

from __future__ import annotations

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from transformers import PreTrainedTokenizerFast


def server_manager(
    tokenizer: PreTrainedTokenizerFast, *base_urls: str, server_type: str, timeout_s: int = 30, health_check: bool = False
) -> ServerManager:
    """As an environment gets it from its command line. The Tinker trainer's engine is of type sglang."""
    return ServerManager(
        [
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
    )
