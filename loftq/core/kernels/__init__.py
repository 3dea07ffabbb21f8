"""Compiled loops for CPUs and GPUs, and the choice between them."""
