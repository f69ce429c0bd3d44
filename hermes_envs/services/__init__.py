"""What the HTTP services have in common, and options from variables."""
