"""Compile a pretrained transformer into a sparse one that really is faster."""
