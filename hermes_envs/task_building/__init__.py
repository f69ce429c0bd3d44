"""Makes sets of tasks: repositories with bugs put into them, and the tests that tell."""
