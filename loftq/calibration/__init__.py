"""Text becomes statistics of the inputs of each layer."""
