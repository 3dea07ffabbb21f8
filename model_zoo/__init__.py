"""Recipes: what to quantize and how, one file a model."""
