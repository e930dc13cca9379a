"""Response text -> Verdict: rules in killable worker processes, then an LLM judge where the rules say wrong.

Files, in reading order: extract, normalise, lexer, primaries, parser, tree (text -> tree); values, functions,
sampling, evaluate (tree -> value); units, shapes, names, intervals, scalars, compare, rules (two answers -> graded);
worker, pool (processes); prompt, cache, judge (HTTP); futures, grader (all of it),
gathered (the verdicts of a step, on every rank).
"""

VERSION = "2"  # of the verdicts: goes up with any change that can turn one verdict into another
