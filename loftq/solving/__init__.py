"""Each layer is solved: the jobs, the allocation of bits, the distillation, the report."""
