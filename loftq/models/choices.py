"""Names that settings choose from, where reading them must import nothing."""

from __future__ import annotations

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")  # in which a model may compute
OFFLOADS = ("experts",)  # parts of a model that can be held in main memory while it runs on a GPU
