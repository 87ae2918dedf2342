"""Commands of the variant store."""
