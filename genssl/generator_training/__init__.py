"""The training of generators: one loop, and the families that use it."""
