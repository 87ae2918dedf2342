"""The generation server."""
