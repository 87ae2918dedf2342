"""Evaluators of frozen encoders, one short file each."""
