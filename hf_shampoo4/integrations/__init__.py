"""What ties the optimizer to the Hugging Face stack; importing this imports neither torch nor transformers."""
