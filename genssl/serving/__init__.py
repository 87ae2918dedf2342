"""The generation server, and what a client needs to use it."""
