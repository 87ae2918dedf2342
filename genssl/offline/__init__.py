"""Variants made ahead of training, and what they will cost."""
