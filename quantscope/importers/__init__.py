"""Foreign logs, dumps and tables → traces: one module a format, ``read.read`` finds out which it is."""
