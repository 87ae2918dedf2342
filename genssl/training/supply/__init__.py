"""Where a run's variants come from."""
