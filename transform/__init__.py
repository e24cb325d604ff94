"""Transforms from images to tensors."""
