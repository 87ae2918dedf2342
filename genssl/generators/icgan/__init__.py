"""Instance-conditioned GANs."""
