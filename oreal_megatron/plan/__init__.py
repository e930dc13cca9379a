"""Memory, time and bytes of a run, search, and simulation of ranks that do not exist."""
