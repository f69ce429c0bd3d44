"""Mathematical problems and the comparison of answers."""
