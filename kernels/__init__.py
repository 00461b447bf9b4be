"""Triton kernels, one file per op. Importing the package itself does nothing."""
