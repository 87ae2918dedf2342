"""YAML files: read with line numbers, overridden by `key=value`, found among the shipped ones, written back."""
