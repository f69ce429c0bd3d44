"""Who answers: an engine by tokens or by messages, the reference solution, or nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hermes_envs.policies.base import Policy, TokensOptions
from hermes_envs.policies.nop import NopPolicy
from hermes_envs.policies.oracle import OraclePolicy

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServerConfig

PolicyName = Literal["tokens", "messages", "oracle", "nop"]


class PolicyOptions(TokensOptions):
    """Who answers, and the options of all policies."""

    policy: PolicyName = Field(default="tokens", description="Who answers.")


def create_policy(options: PolicyOptions, servers: Sequence[APIServerConfig] = (), tokenizer: Any = None) -> Policy:
    """Make the policy that `options.policy` names.

    `tokens` and `messages` ask a model at `servers`, `tokens` with the model's tokenizer; `oracle` and `nop` need neither.

    Raises:
        ConfigError: the policy cannot work with the other options.
    """
    match options.policy:
        case "tokens":
            # Imported when chosen: what these two need takes seconds to load.
            from hermes_envs.policies.tokens import TokensPolicy

            return TokensPolicy(servers, tokenizer, options)
        case "messages":
            from hermes_envs.policies.messages import MessagesPolicy

            return MessagesPolicy(servers, options)
        case "oracle":
            return OraclePolicy()
        case "nop":
            return NopPolicy()
