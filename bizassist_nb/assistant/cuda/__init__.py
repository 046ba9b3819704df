"""Kernels and graphs by which answers are decoded on a GPU."""
