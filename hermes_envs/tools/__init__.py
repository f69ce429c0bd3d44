"""What a model may call, and how its calls reach a slot."""
