"""Diffusion models of images, through the pipelines of diffusers."""
