"""The solvers, which quantize a single weight and initialize its adapter, and the table of methods."""
