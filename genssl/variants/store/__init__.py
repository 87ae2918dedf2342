"""The variant store: LMDB environments, one for each writer, and a manifest. Imports no torch."""
