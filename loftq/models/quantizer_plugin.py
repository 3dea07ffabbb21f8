"""The plug-in for transformers: importing it registers every layout that stock transformers do not know."""

from __future__ import annotations

from importlib import import_module

from loftq.formats.layouts import LAYOUTS

for _layout in LAYOUTS.values():
    if _layout.PLUGIN is not None:
        import_module(_layout.PLUGIN)
