"""Asking for variants before a step needs them: the queue, its depth, the pool of stand-ins."""
