"""genssl: generative augmentation for self-supervised learning, online and offline."""

__version__ = "0.1.0"
