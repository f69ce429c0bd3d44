"""What the HTTP services have in common."""
