"""The clients of the generation server. Imports no torch."""
