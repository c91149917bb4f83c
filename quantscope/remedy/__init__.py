"""What to do about it: choose types, correct tensors, and write the file that an engine loads."""
