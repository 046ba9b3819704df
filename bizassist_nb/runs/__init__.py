"""The run directory: read, written, checked."""
