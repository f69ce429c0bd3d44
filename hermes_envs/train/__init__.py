"""A compact trainer: gets scored groups from atroposlib's `run-api` and trains a model through a Tinker service."""
