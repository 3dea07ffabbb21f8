"""Mathematics: tensors in, tensors out. Imports torch, numpy, scipy and numba alone."""
