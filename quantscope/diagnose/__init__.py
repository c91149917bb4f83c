"""What is wrong: from evidence about an engine to the operation at fault."""
