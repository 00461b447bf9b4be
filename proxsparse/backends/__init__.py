"""What joins PyTorch to the extensions; reached through `ops` alone."""
