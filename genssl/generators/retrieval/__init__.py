"""Neighbours from a bank of images in place of generated ones."""
