"""Recipes of generators that `genssl train-generator` takes."""
