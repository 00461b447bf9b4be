"""The loop of the learned methods, and what it needs on large models and several GPUs."""
