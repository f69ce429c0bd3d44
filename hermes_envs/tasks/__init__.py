"""Task sets and the order in which their tasks are taken."""
