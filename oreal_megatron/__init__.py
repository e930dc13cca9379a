"""OREAL (arXiv 2502.06781) on Megatron-core with colocated vLLM."""

__version__ = "0.2.0"
