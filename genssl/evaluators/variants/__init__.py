"""How good variants are: against real images, their source and each other."""
