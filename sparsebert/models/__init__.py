"""What of a BERT is prunable, task models on top of one, and saving and loading them."""
