"""Response text -> Verdict: rules in killable worker processes, then an LLM judge where the rules say incorrect.

The rules are in the package math_equality. Modules here, in reading order: worker_process, worker_pool (processes);
judge_prompt, verdict_cache, judge (HTTP); futures, grader (rules and judge together); step_verifier (the verdicts of a
step, on every rank); grade_file, file_summary (`oreal verify`).
"""

VERSION = "3"  # of the verdicts: increases with any change that can turn one verdict into another
