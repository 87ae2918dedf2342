"""Encoders, in and out: of runs, libraries and checkpoints of other tools."""
