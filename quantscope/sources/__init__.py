"""Files to metadata and named raw tensors, lazy and memory-mapped."""
