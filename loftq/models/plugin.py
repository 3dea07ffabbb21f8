"""Makes `quant_method: loftq` known to transformers when, and only when, somebody uses its quantizers.

transformers and bitsandbytes take seconds to import; `import loftq` should not. So nothing is imported here:
what is registered is registered in the moment in which transformers' own table of quantizers has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_PLUGIN = "loftq.models.integration"


def install() -> None:
    """Register now if the table is there already, or else as soon as it is."""
    if _TABLE in sys.modules:
        import_module(_PLUGIN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the table once, as everybody else would, and gives it a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the table, or None for every other module."""
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that imports the plug-in after its module."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        self._loader.exec_module(module)
        import_module(_PLUGIN)
