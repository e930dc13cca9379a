"""Decide whether two mathematical answers are the same. Pure Python and mpmath; imports nothing of the trainer.

Public functions and types are listed in `__all__`; README.md describes them.

Modules, in reading order: box_context, extract, golds (text -> answer); normalise, upright_text, ordered_letters,
lexer, primaries, parser, tree (answer -> tree); values, functions, sample_points, evaluator (tree -> value); units,
shapes, variable_names, intervals, compare_values, compare_answers, plain_forms, rules (two answers -> Graded).
"""

from oreal_megatron.math_equality.golds import Gold, read_gold
from oreal_megatron.math_equality.rules import Graded, equal, equals_itself, grade, grade_text

__all__ = ["Gold", "Graded", "equal", "equals_itself", "grade", "grade_text", "read_gold"]
