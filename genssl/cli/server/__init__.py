"""Commands of the generation server."""
