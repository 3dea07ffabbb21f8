"""A backbone and an adapter become one model: the targets, the exports, the comparison of logits."""
