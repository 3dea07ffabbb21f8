"""The `loftq` command, one file a command."""

import sys

if sys.platform == "win32":
    try:
        import loftq  # noqa: F401
    except ImportError as error:
        sys.exit(f"Error: {error}")
