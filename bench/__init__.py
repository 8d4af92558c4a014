"""Experiments and measurements: what is chosen, and how fast it is. Nothing here is imported by npser or kernels."""
