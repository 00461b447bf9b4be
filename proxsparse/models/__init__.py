"""What we know of a Hugging Face model: its targets, their masks, loading and observing it."""
