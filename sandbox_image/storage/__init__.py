"""Workspaces, layers and the disk that they take."""
