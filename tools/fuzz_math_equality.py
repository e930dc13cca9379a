r"""Compare math_equality and math-verify on random answers whose truth is known; report all disagreements by kind:

    pip install math-verify==0.9.0
    nice python tools/fuzz_math_equality.py --count 20000 --seed 1 [--examples 5] [--rules-only]

Each case is a gold, a response and the truth. Expressions are random trees: one is written as LaTeX; the same,
rewritten or changed, is the answer. Both are computed by mpmath at 60 digits at several points, which decides. Pairs of
which one leaves the reals at a point, or that differ by too little to tell, are not counted. Sets, units, letters and
boxes with operators around them are the same or different by construction. Exit code 1: the rules accepted a wrong
answer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import mpmath

from oreal_megatron.math_equality import grade

Tree = tuple  # ("num", Fraction), ("var", name), (operator, tree, ...)
NUMBERS = (
    (13, -5, 2),
    (-29, 31, 3),
    (5, 3, 4),
    (-3, -50, 7),
    (80, 9, 10),
    (211, 2, 12),
    (2, -1, -3),
    (-40, -3, -8),
    (3, 1, 5),
    (1, 2, 6),
    (7000, -11000, 1000),
    (-7000, 11000, -1000),
    (900, 1300, 150),
    (-700, -1100, -99),
)
POINTS = [{"x": Fraction(a, 7), "y": Fraction(b, 11), "n": Fraction(c)} for a, b, c in NUMBERS]
EQUAL, DIFFERENT = mpmath.mpf(10) ** -40, mpmath.mpf(10) ** -30
UNITS = {
    "cm": ("length", "1/100"), "m": ("length", "1"), "km": ("length", "1000"), "mm": ("length", "1/1000"),
    "kg": ("mass", "1000"), "g": ("mass", "1"), "s": ("time", "1"), "minutes": ("time", "60"),
    "hours": ("time", "3600"),
    "N": ("force", "1"), "kN": ("force", "1000"), "J": ("energy", "1"), "kJ": ("energy", "1000"), "W": ("power", "1"),
    "mW": ("power", "1/1000"), "MW": ("power", "1000000"), "V": ("voltage", "1"), "A": ("current", "1"),
    "Hz": ("frequency", "1"), "MHz": ("frequency", "1000000"), "Pa": ("pressure", "1"), "kPa": ("pressure", "1000"),
    "mol": ("amount", "1"), "m/s": ("speed", "1"), "km/h": ("speed in km/h", "1"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A gold answer, a response and whether the answer is right."""

    kind: str
    gold: str
    response: str
    right: bool


# -- random expressions ------------------------------------------------------------------------------------------
def random_tree(chance: random.Random, depth: int, letters: str) -> Tree:
    """Return a random expression of at most this depth."""
    if depth == 0 or chance.random() < 0.15:
        if letters and chance.random() < 0.5:
            return ("var", chance.choice(letters))
        if chance.random() < 0.15:
            return ("pi",)
        top = chance.choice((chance.randint(1, 12), chance.randint(1, 200)))
        return ("num", Fraction(top, chance.choice((1, 1, 1, 2, 3, 4, 7, 9))))
    operator = chance.choice(("add", "add", "sub", "mul", "mul", "div", "pow", "sqrt", "neg", "abs", "fn"))
    first = random_tree(chance, depth - 1, letters)
    if operator == "pow":
        return ("pow", first, ("num", Fraction(chance.choice((2, 2, 3, -1, 4)))))
    if operator == "fn":
        return ("fn", chance.choice(("sin", "cos", "ln", "log2", "floor", "binom2", "fact")), first)
    if operator in ("sqrt", "neg", "abs"):
        return (operator, first)
    return (operator, first, random_tree(chance, depth - 1, letters))


def value(tree: Tree, point: dict[str, Fraction]) -> mpmath.mpf:
    """Return the value at a point. Raises ValueError or ZeroDivisionError where there is no real one."""
    kind, *parts = tree
    if kind == "num":
        return mpmath.mpf(parts[0].numerator) / parts[0].denominator
    if kind == "var":
        return mpmath.mpf(point[parts[0]].numerator) / point[parts[0]].denominator
    if kind == "pi":
        return +mpmath.pi
    if kind == "fn":
        return function(parts[0], value(parts[1], point))
    values = [value(part, point) for part in parts]
    if kind == "sqrt" and values[0] < 0:
        raise ValueError("a root of a negative number")
    operations: dict[str, Callable[..., mpmath.mpf]] = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
        "pow": power, "sqrt": mpmath.sqrt, "neg": lambda a: -a, "abs": abs,
    }  # fmt: skip
    result = operations[kind](*values)
    if not mpmath.isfinite(result) or abs(result) > mpmath.mpf(10) ** 25:
        raise ValueError("out of range")
    return result


def power(base: mpmath.mpf, exponent: mpmath.mpf) -> mpmath.mpf:
    """Return a power with a real value."""
    if base < 0 and exponent != int(exponent):
        raise ValueError("a root of a negative number")
    return base ** (int(exponent) if exponent == int(exponent) else exponent)


def function(name: str, argument: mpmath.mpf) -> mpmath.mpf:
    """Return the value of a named function."""
    if name in ("ln", "log2"):
        if argument <= 0:
            raise ValueError("a logarithm of a number that is not positive")
        return mpmath.log(argument) / (mpmath.log(2) if name == "log2" else 1)
    if name in ("fact", "binom2"):
        if argument != int(argument) or not 0 <= argument <= 15:
            raise ValueError("a factorial of no small integer")
        return mpmath.factorial(argument) if name == "fact" else argument * (argument - 1) / 2
    if name == "floor" and abs(argument - mpmath.nint(argument)) < DIFFERENT:
        raise ValueError("a floor at an integer, which the precision does not decide")
    return {"sin": mpmath.sin, "cos": mpmath.cos, "floor": mpmath.floor}[name](argument)


def same(a: Tree, b: Tree) -> bool | None:
    """Return whether two expressions are equal at every point; None where that cannot be said."""
    verdicts = []
    for point in POINTS:
        left, right = value_or_none(a, point), value_or_none(b, point)
        if left is None and right is None:
            continue
        if left is None or right is None:
            return None
        distance = abs(left - right) / max(1, abs(left), abs(right))
        if EQUAL < distance < DIFFERENT:
            return None
        verdicts.append(distance <= EQUAL)
    return all(verdicts) if len(verdicts) > len(POINTS) // 2 else None


def value_or_none(tree: Tree, point: dict[str, Fraction]) -> mpmath.mpf | None:
    """Return the value at a point, or None where there is no real one."""
    try:
        return value(tree, point)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def latex(tree: Tree, chance: random.Random) -> str:
    """Write an expression in one of its spellings."""
    kind, *parts = tree
    if kind == "num":
        number: Fraction = parts[0]
        top, bottom = number.numerator, number.denominator
        if bottom == 1:
            return f"{{{top}}}" if top < 0 else str(top)
        return chance.choice((rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top}}}{{{bottom}}}", f"({top}/{bottom})"))
    if kind in ("var", "pi"):
        return "\\pi " if kind == "pi" else parts[0]
    if kind == "fn":
        inner = latex(parts[1], chance)
        spelling = {"sin": r"\sin({})", "cos": r"\cos\left({}\right)", "ln": r"\ln({})", "log2": r"\log_2({})",
                    "floor": r"\lfloor {}\rfloor ", "binom2": r"\binom{{{}}}{{2}}", "fact": "({})!"}  # fmt: skip
        return spelling[parts[0]].format(inner)
    texts = [latex(part, chance) for part in parts]
    spellings = {
        "add": ("{}+{}",), "sub": ("{}-({})",), "mul": (r"({})\cdot({})", "({})({})", r"({}) \times ({})"),
        "div": (r"\frac{{{}}}{{{}}}", "({})/({})", r"({}) \div ({})"), "pow": ("({})^{{{}}}",),
        "abs": ("|{}|", r"\left|{}\right|"), "sqrt": (r"\sqrt{{{}}}", "({})^{{1/2}}"), "neg": ("-({})",),
    }  # fmt: skip
    written = chance.choice(spellings[kind]).format(*texts)
    return f"({written})" if kind in ("add", "sub", "neg") else written


def rewritten(tree: Tree, chance: random.Random) -> Tree:
    """Return an equal expression: operands exchanged, terms added and removed again."""
    kind, *parts = tree
    parts = [
        rewritten(part, chance) if isinstance(part, tuple) and part and isinstance(part[0], str) else part
        for part in parts
    ]
    if kind in ("add", "mul") and chance.random() < 0.6:
        return (kind, parts[1], parts[0])
    if kind == "sub" and chance.random() < 0.5:
        return ("neg", ("sub", parts[1], parts[0]))
    if kind == "div" and chance.random() < 0.5:
        return ("mul", parts[0], ("pow", parts[1], ("num", Fraction(-1))))
    if kind == "num" and chance.random() < 0.2:
        step = Fraction(chance.randint(1, 9))
        return ("sub", ("num", parts[0] + step), ("num", step))
    return (kind, *parts)


def changed(tree: Tree, chance: random.Random) -> Tree:
    """Return the expression with one change, which usually makes it another."""
    kind, *parts = tree
    inner = [i for i, part in enumerate(parts) if isinstance(part, tuple) and part and isinstance(part[0], str)]
    if inner and chance.random() < 0.75:
        at = chance.choice(inner)
        return (kind, *parts[:at], changed(parts[at], chance), *parts[at + 1 :])
    if kind == "num":
        return ("num", parts[0] + chance.choice((1, -1, 10, Fraction(1, 9), Fraction(1, 10**6), -2 * parts[0])))
    if kind == "var":
        return ("var", chance.choice("xyn"))
    swapped = {"add": "sub", "sub": "add", "mul": "div", "div": "mul", "sqrt": "abs", "abs": "neg", "neg": "abs"}
    return (swapped[kind], *parts) if kind in swapped else ("add", tree, ("num", Fraction(1, 1000)))


def expressions(kind: str, letters: str) -> Callable[[random.Random], Case | None]:
    """Return a maker of cases: an expression, and the same rewritten or changed."""

    def make(chance: random.Random) -> Case | None:
        gold = random_tree(chance, chance.randint(1, 4), letters)
        answer = chance.choice((rewritten, changed, lambda tree, _: random_tree(chance, 2, letters)))(gold, chance)
        right = same(gold, answer)
        return None if right is None else Case(kind, latex(gold, chance), rf"\boxed{{{latex(answer, chance)}}}", right)

    return make


# -- other answers -----------------------------------------------------------------------------------------------
def number(chance: random.Random) -> Fraction:
    """Return a small fraction, often an integer."""
    return Fraction(chance.randint(-12, 12), chance.choice((1, 1, 1, 2, 3)))


def around_a_box(chance: random.Random) -> Case | None:
    """Make a box with operators around it: the answer is what they make of its content."""
    content, other = ("num", Fraction(chance.randint(2, 12))), ("num", Fraction(chance.randint(2, 9)))
    boxed, n = rf"\boxed{{{content[1]}}}", other[1]
    ten = ("num", Fraction(10 ** chance.randint(1, 3)))
    text, truth = chance.choice((
        (f"-{boxed}", ("neg", content)), (f"x = -{boxed}", ("neg", content)), (f"{n}{boxed}", ("mul", other, content)),
        (rf"\sqrt{{{boxed}}}", ("sqrt", content)), (rf"\frac{{{boxed}}}{{{n}}}", ("div", content, other)),
        (rf"\frac{{{n}}}{{{boxed}}}", ("div", other, content)), (rf"{boxed} \times {ten[1]}", ("mul", content, ten)),
        (f"{boxed}!", ("fn", "fact", content)), (f"{boxed}^2", ("mul", content, content)),
        (f"{boxed}+{n}", ("add", content, other)), (f"{n} - {boxed}", ("sub", other, content)),
        (rf"{n} \cdot {boxed}", ("mul", other, content)), (rf"{boxed}\pi", ("mul", content, ("pi",))),
        (rf"{boxed}\text{{ thousand}}", ("mul", content, ("num", Fraction(1000)))), (rf"x = {n} = {boxed}", content),
        (f"({boxed})", content), (rf"\left({boxed}\right)^3", ("pow", content, ("num", Fraction(3)))),
        (rf"\ln {boxed}", ("fn", "ln", content)),
    ))  # fmt: skip
    dressed = chance.choice(("${}$", r"so we get \[ {} \]", "the answer is ${}$.", "$$y = {}.$$")).format(text)
    gold = chance.choice((truth, content, ("neg", content)))
    right = same(gold, truth)
    return None if right is None else Case("operators around a box", latex(gold, chance), dressed, right)


def nested(chance: random.Random, depth: int) -> object:
    """Return a random number, set or tuple."""
    if depth == 0 or chance.random() < 0.4:
        return Fraction(chance.randint(1, 4))
    items = [nested(chance, depth - 1) for _ in range(chance.randint(1, 3))]
    return frozenset(items) if chance.random() < 0.6 else tuple(items) if len(items) > 1 else items[0]


def containers(chance: random.Random) -> Case | None:
    """Make nested sets and tuples."""
    gold = frozenset(nested(chance, 2) for _ in range(chance.randint(2, 3)))
    answer = chance.choice((gold, frozenset(nested(chance, 2) for _ in range(2)), _flattened(gold)))
    if len(gold) == 1 or len(answer) == 1:
        return None  # a set of one may be written as its element
    return Case(
        "nested sets and tuples", _written(gold, chance), rf"\boxed{{{_written(answer, chance)}}}", gold == answer
    )


def _flattened(items: frozenset) -> frozenset:
    return frozenset(inner for item in items for inner in (item if isinstance(item, frozenset) else (item,)))


def _written(item: object, chance: random.Random) -> str:
    if isinstance(item, Fraction):
        return str(item)
    parts = [_written(part, chance) for part in item]
    if isinstance(item, tuple):
        return f"({', '.join(parts)})"
    return r"\{" + ", ".join(chance.sample(parts, len(parts))) + r"\}"


def quantities(chance: random.Random) -> Case | None:
    """Make a number with a unit, against the same or another unit of the same quantity or of another."""
    unit, other = chance.choice(list(UNITS)), chance.choice(list(UNITS))
    (quantity, factor), (other_quantity, other_factor) = UNITS[unit], UNITS[other]
    size = Fraction(chance.randint(1, 999))
    amount = size * Fraction(factor) / Fraction(other_factor)
    amount = amount if chance.random() < 0.7 else size
    right = quantity == other_quantity and amount * Fraction(other_factor) == size * Fraction(factor)
    spelling = chance.choice((r"{}\text{{ {}}}", r"\text{{{} {}}}", r"{}\,\mathrm{{{}}}"))
    answer = spelling.format(amount if amount.denominator == 1 else f"{float(amount):g}", other)
    if amount.denominator != 1 and Fraction(f"{float(amount):g}") != amount:
        return None
    return Case("units", rf"{size}\text{{ {unit}}}", rf"\boxed{{{answer}}}", right)


def letters(chance: random.Random) -> Case | None:
    """Make letters whose order matters."""
    points = "".join(chance.sample("ABCDE", 3))
    other = "".join(chance.sample(points, 3)) if chance.random() < 0.8 else "".join(chance.sample("ABCDE", 3))
    mark, turned = chance.choice(
        (
            (r"\angle {}", True),
            (r"\widehat{{{}}}", True),
            (r"\overrightarrow{{{}}}", False),
            (r"\overline{{{}}}", False),
        )
    )
    if "{{" in mark and not turned:
        points, other = (points[:2], other[:2]) if "arrow" in mark else (points.lower(), other.lower())
    right = points == other or turned and points == other[::-1]
    return Case("letters in their order", mark.format(points), rf"\boxed{{{mark.format(other)}}}", right)


def doubles(chance: random.Random) -> Case | None:
    """Make a number against a double as Python prints it, right or a little off."""
    tree = random_tree(chance, 2, "")
    exact = value_or_none(tree, POINTS[0])
    if exact is None:
        return None
    double = float(exact)
    off = chance.choice((0.0, 0.0, 1e-12, 1e-9, -1e-10)) * double
    text = repr(double + off)
    if len(text.strip("-0.").replace(".", "")) < 16 or "e" in text or not 1e-3 < abs(double) < 1e12:
        return None
    return Case("doubles", latex(tree, chance), rf"\boxed{{{text}}}", off == 0)


MAKERS: tuple[Callable[[random.Random], Case | None], ...] = (
    expressions("numbers", ""), expressions("one letter", "x"), expressions("two letters", "xy"),
    expressions("integers", "n"), around_a_box, containers, quantities, letters, doubles,
)  # fmt: skip


def cases(count: int, seed: int) -> Iterator[Case]:
    """Yield random cases, of every kind alike."""
    chance, made = random.Random(seed), 0
    while made < count:
        case = MAKERS[made % len(MAKERS)](chance)
        if case is not None:
            made += 1
            yield case


# -- verdicts ----------------------------------------------------------------------------------------------------
def by_math_verify() -> Callable[[Case], bool]:
    """Return math-verify as its authors call it, with more time: its alarms also count the time of other processes."""
    from math_verify import parse, verify

    def call(case: Case) -> bool:
        gold, answer = (parse(text, parsing_timeout=60) for text in (f"${case.gold}$", case.response))
        return bool(verify(gold, answer, timeout_seconds=60))

    return call


def main() -> int:
    """Grade all cases by both; print counts by kind, and the disagreements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=3, help="disagreements shown of each kind")
    parser.add_argument("--rules-only", action="store_true", help="without math-verify")
    args = parser.parse_args()
    mpmath.mp.dps = 60
    second = None if args.rules_only else by_math_verify()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    shown: dict[tuple[str, str], list[Case]] = defaultdict(list)
    slowest, start = 0.0, time.monotonic()
    for case in cases(args.count, args.seed):
        begin = time.process_time()
        ours = grade(case.gold, case.response).outcome == "correct"
        slowest = max(slowest, time.process_time() - begin)
        verdicts = {"rules": ours} | ({"math-verify": second(case)} if second else {})
        counts[case.kind].update(["cases", "right answers"][: 1 + case.right])
        for name, verdict in verdicts.items():
            if verdict != case.right:
                error = f"{name}: {'false accepts' if verdict else 'false rejects'}"
                counts[case.kind][error] += 1
                shown[case.kind, error].append(case)
        counts[case.kind]["disagreements"] += len(set(verdicts.values())) > 1
    report(counts, shown, args.examples)
    seconds = time.monotonic() - start
    print(f"{args.count} cases, seed {args.seed}: {seconds:.0f} s; the slowest of the rules {slowest:.3f} CPU s")
    return int(any(count["rules: false accepts"] for count in counts.values()))


def report(counts: dict[str, Counter[str]], shown: dict[tuple[str, str], list[Case]], examples: int) -> None:
    """Print the counts of every kind, and examples of the errors on either side."""
    for kind, count in counts.items():
        print(f"{kind}: " + ", ".join(f"{name} {number}" for name, number in count.items()))
        for (of_kind, error), wrong in shown.items():
            for case in wrong[:examples] if of_kind == kind else ():
                truth = "equal" if case.right else "different"
                print(f"    {error[:-1]}: gold {case.gold}   response {case.response}   ({truth})")


if __name__ == "__main__":
    raise SystemExit(main())
