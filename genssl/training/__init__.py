"""Training runs, and the training of generators."""
