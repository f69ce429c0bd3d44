"""What `process` and `evaluate` do: many groups, an account, a record."""
