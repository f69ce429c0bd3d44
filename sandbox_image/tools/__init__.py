"""What can be done in a slot: shells, terminals, files, artifacts."""
