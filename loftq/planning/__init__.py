"""Decides everything about a run before the first weight is read."""
