"""Recipes, generator recipes and server files: pydantic models, YAML with line numbers, `key=value` overrides."""
