"""Who can produce a Trace."""
