"""Merges a backbone and an adapter into one model: the targets, and the comparison of logits."""
