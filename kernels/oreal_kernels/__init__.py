"""Fused operations of OREAL training; imports torch and triton only."""

from oreal_kernels.logprob import combine, gradient, statistics

__all__ = ["combine", "gradient", "statistics"]
