"""Reads models and texts from folders, the Hub or this package, and pushes finished folders to the Hub."""
