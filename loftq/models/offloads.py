"""The parts of a model that can be held in main memory while it runs on a GPU (`--offload`)."""

OFFLOADS = ("experts",)
