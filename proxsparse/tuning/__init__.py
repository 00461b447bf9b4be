"""Measures what a sparse layer runs on."""
