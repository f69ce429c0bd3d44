"""Who answers: an engine by tokens or by messages, the reference solution, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hermes_envs.policies.base import Policy, TokensOptions
from hermes_envs.policies.nop import NopPolicy
from hermes_envs.policies.oracle import OraclePolicy

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig
    from atroposlib.envs.server_handling.server_manager import ServerManager

PolicyName = Literal["tokens", "messages", "oracle", "nop"]


class PolicyOptions(TokensOptions):
    """Who answers, and everything that any policy can be told."""

    policy: PolicyName = Field(default="tokens", description="Who answers.")


def create_policy(
    options: PolicyOptions,
    *,
    server: Callable[[], ServerManager],
    tokenizer: Callable[[], Any],
    server_configs: Sequence[APIServerConfig],
) -> Policy:
    """Make the policy that `options.policy` names.

    `server` and `tokenizer` are called for `tokens` only and `server_configs` is read for `messages` only, so that `oracle` and
    `nop` work where there is neither a model nor an endpoint.

    Raises:
        ConfigError: the policy cannot work with the other options.
    """
    match options.policy:
        case "tokens":
            # Imported when chosen: what these two need takes seconds to load.
            from hermes_envs.policies.tokens import TokensPolicy

            return TokensPolicy(server(), tokenizer(), options)
        case "messages":
            from hermes_envs.policies.messages import MessagesPolicy

            return MessagesPolicy(server_configs, options)
        case "oracle":
            return OraclePolicy()
        case "nop":
            return NopPolicy()
