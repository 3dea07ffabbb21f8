"""The quantized linears that a manifest lists: their types, shapes and tensors, without torch and without a layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loftq.core.grid import Grid
from loftq.errors import ArtifactError
from loftq.formats.artifact import MANIFEST, Artifact
from loftq.formats.layouts import LAYOUTS
from loftq.formats.schema import AGAIN

_WHOLE = (".bias", "_bias")  # the ends of names of tensors beside a quantized weight that stay as they were


@dataclass(frozen=True)
class QuantizedLinears:
    """The types and shapes, (out, in), of quantized linears by module name.

    Among them are fused experts, by the name of the parameter, with shapes (experts, out, in).
    """

    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, ...]]

    def tensors(self, names: Iterable[str]) -> dict[str, str]:
        """The module of each of these tensors that is part of a quantized weight, by the name of the tensor.

        A layout gives the linears of a type the same tensors. Raises ArtifactError if a linear lacks one that others
        of its type have.
        """
        found: dict[str, str] = {}
        ends: dict[str, set[str]] = {module: set() for module in self.grids}
        for name in names:
            module = self._module_of(name)
            if module is not None:
                found[name] = module
                ends[module].add(name.removeprefix(module))
        common: dict[tuple[Grid, int], set[str]] = defaultdict(set)
        for module, grid in self.grids.items():
            common[grid, len(self.shapes[module])] |= ends[module]
        for module, grid in self.grids.items():
            lacking = sorted(common[grid, len(self.shapes[module])] - ends[module])
            if lacking or not ends[module]:
                name = module + (lacking or [".weight"])[0]
                raise ArtifactError(f"the tensor {name!r} is missing: `loftq verify` lists all problems")
        return found

    def _module_of(self, name: str) -> str | None:
        """The module with whose name a tensor's name begins. The tensors of fused experts may continue with `_`."""
        module = name
        while module:
            end = name.removeprefix(module)
            if end in _WHOLE:
                return None
            if module in self.grids and (end.startswith(".") or len(self.shapes[module]) == 3):
                return module
            module = module[: max(module.rfind("."), module.rfind("_"), 0)]
        return None


def listed_linears(artifact: Artifact) -> QuantizedLinears:
    """The quantized linears of a loftq folder. Raises ArtifactError if it has none."""
    manifest = artifact.manifest
    recipe, rows = manifest["recipe"], manifest["layers"]
    if not rows or manifest.get("format") not in LAYOUTS:
        raise ArtifactError(
            f"{artifact.folder} is a {manifest['kind']} folder without a quantized backbone: "
            "expected a folder that `loftq quantize` wrote"
        )
    shared = recipe["block_size"] if recipe["group_size"] is None else recipe["group_size"]
    if shared is None:
        raise ArtifactError(
            f"{artifact.folder / MANIFEST} is damaged (recipe has no block_size and no group_size): {AGAIN}"
        )
    grids = {row["name"]: Grid(row["codebook"], shared, recipe["double_quant"], recipe["zero_point"]) for row in rows}
    return QuantizedLinears(grids, {row["name"]: tuple(row["shape"]) for row in rows})
