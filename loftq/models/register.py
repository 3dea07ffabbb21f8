"""Registers our format with transformers, and our LoRA layer with peft, as soon as a program imports these.

transformers and peft take seconds to import, and `import loftq` should not. Therefore this module imports neither: our
classes are registered right after a program has imported the table of transformers or peft to which they belong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_PLUGINS = {
    "transformers.quantizers.auto": "loftq.models.quantizer_plugin",
    "peft.tuners.lora.model": "loftq.models.peft_layers",
}


def install() -> None:
    """Register now with each table that has been imported already, and with the others when they are imported."""
    for table, plugin in _PLUGINS.items():
        if table in sys.modules:
            import_module(plugin)
        elif not any(isinstance(finder, _Finder) and finder.table == table for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(table, plugin))


class _Finder(MetaPathFinder):
    """Finds the module of a table once, by the usual way, and gives it a loader that registers afterwards."""

    def __init__(self, table: str, plugin: str) -> None:
        self.table = table
        self._plugin = plugin

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the table's module, or None for every other module."""
        if fullname != self.table:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self._plugin)
        return spec


class _Registering(Loader):
    """A loader that loads its module as usual and imports a plug-in afterwards."""

    def __init__(self, loader: Loader, plugin: str) -> None:
        self._loader = loader
        self._plugin = plugin

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then import the plug-in, which registers itself."""
        self._loader.exec_module(module)
        import_module(self._plugin)
