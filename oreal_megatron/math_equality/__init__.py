"""Equality of two answers: extract, normalise, parse, compare."""
