"""Measure a last symbolic step with sympy behind the rules, on labelled pairs that the rules call incorrect:

    python tools/measure_sympy_step.py ../shared/data/grading_pairs.jsonl ../shared/data/field_pairs.jsonl \
        ../shared/data/evil_answers.jsonl

The step stands where two expressions are compared: where the rules find them different, their trees (never their
text) become sympy expressions, and they count as equal when `simplify(gold - answer)` is 0. Every pair is graded with
it in a process of its own that is killed after the verifier's time limit. Prints the pairs that the step would accept
(recovered where they are labelled equal, false accepts elsewhere), those it could not finish, and its latency.
docs/reference/verifier.md says what follows from the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import sympy

from oreal_megatron import config
from oreal_megatron.math_equality import rules
from oreal_megatron.math_equality.compare_answers import AnswerComparison
from oreal_megatron.math_equality.tree import Node

LIMIT_S = config.VerifyConfig().timeout_s
MEMORY_BYTES = config.VerifyConfig().memory_mib * 2**20
COMPARED_AS_VALUES = ("numeric", "symbolic")  # other pairs were decided as text: strings, choices, words, lists
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}
FUNCTIONS: dict[str, Callable[..., sympy.Basic]] = {
    "sqrt": sympy.sqrt, "root": sympy.root, "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling,
    "!": sympy.factorial, "!!": sympy.factorial2, "binom": sympy.binomial, "max": sympy.Max, "min": sympy.Min,
    "ln": sympy.log, "log": sympy.log, "lg": lambda x: sympy.log(x, 10), "exp": sympy.exp, "sin": sympy.sin,
    "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc, "arcsin": sympy.asin,
    "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh,
}  # fmt: skip


class NoExpression(ValueError):
    """The tree is no single expression that this script translates: a list, an interval, words."""


def to_sympy(node: Node) -> sympy.Expr:
    """Return the sympy expression of a tree. Letters are real; n, m, k, i and j are whole numbers and not negative."""
    kind = node[0]
    if kind == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if kind == "atom":
        return symbol(node[1])
    if kind == "const" and node[1] in CONSTANTS:
        return CONSTANTS[node[1]]
    if kind in ("add", "mul"):
        return {"add": sympy.Add, "mul": sympy.Mul}[kind](*map(to_sympy, node[1]))
    if kind == "neg":
        return -to_sympy(node[1])
    if kind == "div":
        return to_sympy(node[1]) / to_sympy(node[2])
    if kind == "pow":
        return to_sympy(node[1]) ** to_sympy(node[2])
    if kind == "pct":
        return to_sympy(node[1]) / 100
    if kind == "fn":
        return function(node[1], node[2])
    raise NoExpression(kind)


def symbol(name: str) -> sympy.Symbol:
    """Return the sympy symbol of a letter."""
    whole = name in ("n", "m", "k", "i", "j")
    return sympy.Symbol(name, integer=True, nonnegative=True) if whole else sympy.Symbol(name, real=True)


def function(name: str, arguments: tuple[Node, ...]) -> sympy.Expr:
    """Return a function, a sum, a product or a definite integral."""
    if name in ("sum", "prod", "int"):
        return bounded(name, *arguments)
    if name in FUNCTIONS:
        return FUNCTIONS[name](*map(to_sympy, arguments))
    if name == "_":
        return sympy.Symbol(repr(arguments), real=True)
    raise NoExpression(name)


def bounded(name: str, body: Node, low: Node, high: Node) -> sympy.Expr:
    """Return sum_{k=low}^{high} body, its product, or the integral whose body ends in d and a letter."""
    if name == "int":
        if body[0] != "mul" or [part[0] for part in body[1][-2:]] != ["atom", "atom"] or body[1][-2][1] != "d":
            raise NoExpression("an integral without dx")
        integrand = sympy.Mul(*map(to_sympy, body[1][:-2]))
        return sympy.integrate(integrand, (symbol(body[1][-1][1]), to_sympy(low), to_sympy(high)))
    if low[0] != "rel" or low[2] != ("=",):
        raise NoExpression("bounds without a variable")
    letter = low[1][0][1]
    # the letters e and i are constants to the parser; as the variable of a sum they are letters
    renamed = constant_as_letter(body, letter)
    make = {"sum": sympy.summation, "prod": sympy.product}[name]
    return make(to_sympy(renamed), (symbol(letter), to_sympy(low[1][1]), to_sympy(high)))


def constant_as_letter(node: object, letter: str) -> Node:
    """Return the tree with the constant `letter` as a variable."""
    if node == ("const", letter):
        return ("atom", letter)
    return tuple(constant_as_letter(part, letter) for part in node) if isinstance(node, tuple) else node


def equal_by_sympy(gold: Node, answer: Node) -> bool:
    """Return whether sympy simplifies the difference of two trees to 0."""
    try:
        return sympy.simplify(to_sympy(gold) - to_sympy(answer)) == 0
    except NoExpression:
        return False


class WithSympy(AnswerComparison):
    """The comparison of two answers, with the step behind it."""

    def scalars(self, gold: Node, predicted: Node) -> bool:
        """Compare by the rules, then by sympy."""
        return super().scalars(gold, predicted) or equal_by_sympy(gold, predicted)


def grade_with_sympy(gold: str, answer: str, out: Connection) -> None:
    """Send "equal", "different" or "error" for one pair, and the seconds it took."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    rules.AnswerComparison = WithSympy
    start = time.perf_counter()
    try:
        result = "equal" if rules.grade_text(gold, answer).outcome == "correct" else "different"
    except Exception as error:
        result = f"error {type(error).__name__}"
    out.send((result, time.perf_counter() - start))


def measure(gold: str, answer: str) -> tuple[str, float]:
    """Return the step's result and seconds, from a process that ends at the time limit."""
    context = multiprocessing.get_context("fork")  # sympy is loaded once, here
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=grade_with_sympy, args=(gold, answer, send))
    process.start()
    send.close()
    try:
        result = receive.recv() if receive.poll(LIMIT_S) else ("time-out", LIMIT_S)
    except EOFError:
        result = ("killed", LIMIT_S)
    process.kill()
    process.join()
    return result


def main() -> None:
    """Run the step on every pair of the files that the rules call incorrect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSONL with gold, pred or answer, and label or expect")
    for path in parser.parse_args().files:
        counts: Counter[str] = Counter()
        seconds = []
        for row in map(json.loads, path.open("rb")):
            if (answer := row.get("pred", row.get("answer"))) is None:
                continue  # a whole response: the box it lacks is not a matter of algebra
            gold, answer = str(row["gold"]), str(answer)
            equal = bool(row["label"]) if "label" in row else row["expect"].startswith("either")
            graded = rules.grade_text(gold, answer)
            if graded.outcome == "correct" or graded.method not in COMPARED_AS_VALUES:
                continue
            result, took = measure(gold, answer)
            counts[result] += 1
            seconds.append(took)
            if result == "equal":
                print(f"  {'recovered' if equal else 'FALSE ACCEPT'} {row.get('kind', '')}: {gold} | {answer}"[:160])
        print(f"{path.name}: {dict(counts)}")
        if seconds:
            ordered = sorted(seconds)
            median_ms, late_ms = statistics.median(ordered) * 1e3, ordered[int(0.99 * len(ordered))] * 1e3
            print(f"  median {median_ms:.0f} ms, p99 {late_ms:.0f} ms, worst {ordered[-1]:.2f} s")


if __name__ == "__main__":
    main()
