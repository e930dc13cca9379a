"""Checks of a machine and a recipe, and small real runs."""
