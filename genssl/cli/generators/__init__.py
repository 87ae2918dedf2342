"""Commands that train, judge and use generators."""
