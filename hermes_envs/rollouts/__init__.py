"""One trajectory and one group: the agent loop and what it leaves behind."""
