"""What is needed because atroposlib 0.4 is as it is; its upstream is archived, so it will stay so."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, NoReturn

import jsonlines
import wandb
from atroposlib.envs.base import APIServer, APIServerConfig
from atroposlib.envs.server_handling.server_baseline import ServerBaseline

from hermes_envs.errors import ConfigError
from hermes_envs.policies.token_endpoint import check_server_type

logger = logging.getLogger(__name__)

PLACEHOLDER_TOKENIZER = Path(__file__).parent.parent / "placeholder_tokenizer"
"""A tokenizer of bytes for runs whose policy has no tokens: atroposlib loads one in its constructor, from a hub if need be."""


class UnusedServer(APIServer):  # type: ignore[misc]
    """Stands where atroposlib makes an engine client, which would want a key and a tokenizer; policies have their own."""

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        """There is nothing to check."""

    async def _never_asked(self, **kwargs: Any) -> NoReturn:
        raise NotImplementedError

    _chat_completion_wrapper = _completion_wrapper = _tokens_and_logprobs_completion_wrapper = _never_asked


def usable_endpoints(policy: str, servers: ServerBaseline | list[APIServerConfig]) -> list[APIServerConfig]:
    """The configured endpoints; a single one without address for a policy that asks no model.

    Raises:
        ConfigError: the policy needs one, and guessing a server would be a silent fallback; or one that returns token ids.
    """
    if policy in ("oracle", "nop"):
        return [APIServerConfig(base_url="")]
    if not isinstance(servers, list) or not servers or not all(server.base_url for server in servers):
        raise ConfigError(
            f"openai.base_url: no inference endpoint is configured, and policy {policy!r} needs one: pass "
            "--openai.base_url URL --openai.model_name NAME, or try scripts/demo, which needs no model"
        )
    if policy == "tokens":
        for server in servers:
            check_server_type(server)
    return servers


def hide_api_keys() -> None:
    """Keep keys out of what atroposlib's commands print: the whole configuration of each endpoint."""
    APIServerConfig.model_fields["api_key"].repr = False


def allow_local_endpoints() -> None:
    """Keep atroposlib's commands from warning of each address on this machine, where engines often are."""
    warnings.filterwarnings("ignore", message="You are using a local Base URL", category=UserWarning)


def flushing_writer(writer: jsonlines.Writer | None, path: str) -> jsonlines.Writer:
    """A writer of groups that keeps none in memory, in the place of atroposlib's: what is collected survives whatever comes."""
    if writer is not None:
        writer.close()
    return jsonlines.open(path, "w", flush=True)


def start_wandb(project: str | None, name: str, config: dict[str, Any], group: str | None = None) -> bool:
    """Start a run of metrics; False where nobody has logged in, for wandb would ask, or fail where it cannot."""
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        logger.warning("wandb: not logged in, metrics are not sent; set WANDB_API_KEY, or --env.use_wandb false")
        return False
    wandb.init(project=project, group=group, name=name, config=config)
    return True
