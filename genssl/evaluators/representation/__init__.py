"""Properties of a representation that need no labels, and comparisons of two."""
