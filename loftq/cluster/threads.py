"""The numbers of threads on which the last bits of matrix products depend: torch's, and those of scipy's BLAS."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Threads:
    """The numbers of threads of torch and of scipy's BLAS."""

    torch: int
    blas: int

    def use(self) -> None:
        """Compute with these numbers in this thread and, as for BLAS, in this process, from now on."""
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(self.torch)
        threadpool_limits(self.blas, user_api="blas")


def threads_here() -> Threads:
    """The numbers of this process."""
    import scipy.linalg.blas  # noqa: F401  # its library must be loaded to be asked
    from threadpoolctl import threadpool_info

    blas = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    return Threads(torch.get_num_threads(), max(blas, default=1))
