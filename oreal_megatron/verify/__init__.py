"""Response text -> Verdict: rules in killable worker processes, then an LLM judge where the rules say wrong.

Files, in reading order: normalise, extract, lexer, parser (text -> tree), numbers, evaluate (tree -> value),
shapes, compare, rules (two answers -> graded), worker, pool (processes), prompt, cache, judge (HTTP), grader (all
of it).
"""

VERSION = "1"  # of the verdicts: goes up with any change that can turn one verdict into another
