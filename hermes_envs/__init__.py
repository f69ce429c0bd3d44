"""Environments in which a language model solves tasks by calling tools inside sandboxes."""
