"""How well labels can be read from frozen features."""
