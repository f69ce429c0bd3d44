"""Groups for a trainer, through atroposlib's `run-api`."""
