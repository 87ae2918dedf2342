"""Studies: arms x seeds of one recipe, compared, and the report about them."""
