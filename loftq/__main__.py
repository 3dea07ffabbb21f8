"""`python -m loftq`: the command line, where the script `loftq` is not on the path."""

from __future__ import annotations

from loftq_cli.main import main  # type: ignore[import-not-found]  # setuptools names the folder `cli` so

if __name__ == "__main__":
    main()
