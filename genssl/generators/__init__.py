"""Generators: image conditioners and decoders, and their samplers."""
