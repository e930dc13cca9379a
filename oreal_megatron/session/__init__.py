"""Build the parts of a run from a Config; start and stop them."""
