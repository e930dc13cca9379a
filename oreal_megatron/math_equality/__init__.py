"""Decide whether two mathematical answers are the same. Pure Python and mpmath; imports nothing of the trainer.

Public functions and types are listed in `__all__`; README.md describes them.

Modules, in reading order: extract, normalise, lexer, primaries, parser, tree (text -> tree); values, functions,
sample_points, evaluator (tree -> value); units, shapes, variable_names, intervals, compare_values, compare_answers,
rules (two answers -> Graded).
"""

from oreal_megatron.math_equality.rules import Graded, equal, equals_itself, grade, grade_text

__all__ = ["Graded", "equal", "equals_itself", "grade", "grade_text"]
