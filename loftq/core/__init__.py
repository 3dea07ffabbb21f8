"""The mathematics: functions from tensors to tensors. Imports only torch, numpy, scipy and numba."""
