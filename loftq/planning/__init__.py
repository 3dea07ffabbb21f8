"""Everything that is decided before the first weight is read."""
