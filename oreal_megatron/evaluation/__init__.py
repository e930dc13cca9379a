"""Scores, suites, statistics and results."""
