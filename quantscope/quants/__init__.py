"""Bytes to float32 and back, for every ggml tensor type."""
