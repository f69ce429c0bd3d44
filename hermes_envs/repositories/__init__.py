"""Repositories at one commit, with an environment that runs their tests."""
