"""Decides rewards where nothing that an agent could touch takes part."""
