"""The `loftq` command, one file a command."""
