"""The bubblewrap box of a slot and what keeps it closed."""
