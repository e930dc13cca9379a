"""Models and training through Megatron-core; the only package that imports megatron."""
