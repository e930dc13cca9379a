"""Build the pieces of a run from a Config; start and stop them."""
