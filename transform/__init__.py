"""Pictures to tensors."""
