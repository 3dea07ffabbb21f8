"""Computes statistics of the inputs of each layer from text."""
