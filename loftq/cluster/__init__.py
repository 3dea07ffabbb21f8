"""Runs the jobs of a run on the processes and machines of a Ray cluster."""
