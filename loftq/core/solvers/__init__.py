"""The solvers of a single weight, and the table of methods."""
