"""Data sets: uint8 images with a label or none, each named by the digest of its stored bytes."""
