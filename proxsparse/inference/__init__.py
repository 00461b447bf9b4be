"""A pruned model as it runs: packed layers, compiled, decoding."""
