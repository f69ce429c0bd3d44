"""Slots as terminals for programs that bring their own agent: hermes-agent, mini-swe-agent."""
