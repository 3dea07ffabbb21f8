"""How Sphinx builds the site; `make docs` runs it with warnings as errors."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "loftq"
author = "The loftq authors"
version = release = version_of("loftq")

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # links to headings, with the anchors that GitHub makes

html_theme = "furo"
html_title = "loftq"
html_copy_source = False
