"""Benchmarks that people run against what they have deployed."""
