"""What is known of a Hugging Face model: its targets, their masks, how it is loaded and observed."""
