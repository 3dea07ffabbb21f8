"""One file for each verb of the command line and of the Python API."""
