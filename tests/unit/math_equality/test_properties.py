"""Generated expressions: equal by construction, different by construction, and text that is anything at all."""

from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from oreal_megatron.math_equality import rules

WHOLE = st.integers(-999, 999)
LEAVES = st.one_of(
    WHOLE.map(lambda n: (f"{{{n}}}", f"({n})", Fraction(n))),
    st.tuples(WHOLE, st.integers(1, 99)).map(
        lambda f: (f"\\frac{{{f[0]}}}{{{f[1]}}}", f"({f[0]}/{f[1]})", Fraction(*f))
    ),
    st.integers(-9999, 9999).map(lambda n: (f"({n / 100})", f"(\\frac{{{n}}}{{100}})", Fraction(n, 100))),
)


def combined(parts):
    """Two spellings and the value of a sum, difference, product, quotient or square: (LaTeX, other spelling, value)."""

    def build(triple):
        (a, b, x), (c, d, y), op = triple
        if op == "+":
            return f"{a}+{c}", f"{d}+{b}", x + y
        if op == "-":
            return f"({a})-({c})", f"-({d})+({b})", x - y
        if op == "*":
            return f"({a})({c})", f"({d}) \\cdot ({b})", x * y
        if op == "^":
            return f"({a})^2", f"({b}) \\times ({b})", x * x
        return (f"\\frac{{{a}}}{{{c}}}", f"({b}) \\div ({d})", x / y) if y else (a, b, x)

    return st.tuples(parts, parts, st.sampled_from("+-*/^")).map(build)


EXPRESSIONS = st.recursive(LEAVES, combined, max_leaves=8)
LETTERED = st.tuples(EXPRESSIONS, EXPRESSIONS, EXPRESSIONS)


def fraction(value):
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


@given(EXPRESSIONS)
def test_two_spellings_of_one_number_are_equal(expression):
    latex, other, value = expression
    assert rules.equal(latex, other)[0] and rules.equal(fraction(value), latex)[0]


@given(EXPRESSIONS, st.fractions(max_denominator=10**6).filter(bool))
def test_a_number_is_not_itself_and_a_bit(expression, bit):
    latex, _, value = expression
    assert not rules.equal(fraction(value), f"({latex})+{fraction(bit)}")[0]
    if "." not in latex:  # a gold decimal stands for what rounds to it
        assert not rules.equal(latex, fraction(value + bit))[0]


@given(LETTERED)
def test_a_polynomial_equals_its_factors(parts):
    (a, b, _), (c, d, _), (e, f, _) = parts
    product = f"(({a})x+({c}))(x-({e}))"
    expanded = f"({b})x^2+({d})x-({b})({f})x-({d})({f})"
    assert rules.equal(product, expanded)[0] and rules.equal(expanded, product)[0]


@given(LETTERED, st.sampled_from(["x", "1", "\\frac{1}{1000000}x^2", "10^{-30}", "\\sin x", "|x|"]))
def test_a_polynomial_is_not_itself_and_a_term(parts, term):
    (a, _, _), (c, _, _), _ = parts
    polynomial = f"({a})x^2+({c})x+1"
    assert not rules.equal(polynomial, f"{polynomial}+{term}")[0]


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2, 60))
def test_roots_and_powers(a, b, n):
    assert rules.equal(f"\\sqrt{{{a}}}\\sqrt{{{b}}}", f"\\sqrt{{{a * b}}}")[0]
    assert rules.equal(f"\\sqrt[{n}]{{{a}}}", f"{a}^{{1/{n}}}")[0]
    assert not rules.equal(f"\\sqrt[{n}]{{{a}}}", f"\\sqrt[{n}]{{{a + 1}}}")[0]
    assert rules.equal(f"{a}^{{{b}}}\\cdot {a}", f"{a}^{{{b + 1}}}")[0]
    assert a == 1 or not rules.equal(f"{a}^{{{b}}}", f"{a}^{{{b + 1}}}")[0]


@given(st.integers(10**3, 10**60), st.integers(1, 9))
def test_close_integers_differ(n, bit):
    assert not rules.equal(str(n), str(n + bit))[0]
    assert not rules.equal(str(n), f"{n}.{bit}")[0]
    assert not rules.equal(str(n), f"{n}{bit}")[0] and not rules.equal(str(n), f"{n}00")[0]
    assert rules.equal(str(n), f"{n:,}")[0] and rules.equal(f"{n:,}".replace(",", "{,}"), str(n))[0]


@given(st.lists(WHOLE, min_size=2, max_size=6, unique=True), st.randoms())
def test_lists_and_sets_in_any_order_tuples_in_theirs(items, random):
    shuffled = random.sample(items, len(items))
    bare, other = ", ".join(map(str, items)), ", ".join(map(str, shuffled))
    assert rules.equal(bare, other)[0] and rules.equal(f"\\{{{bare}\\}}", f"\\{{{other}\\}}")[0]
    assert rules.equal(f"({bare})", f"({other})")[0] is (items == shuffled)
    assert not rules.equal(bare, ", ".join(map(str, items[1:])))[0]
    assert not rules.equal(bare, f"{bare}, 1000")[0]


@given(WHOLE, WHOLE, st.sampled_from(["()", "[]", "(]", "[)"]), st.sampled_from(["()", "[]", "(]", "[)"]))
def test_intervals_have_their_own_ends(a, b, these, those):
    low, high = min(a, b), max(a, b) + 1
    gold = f"{these[0]}{low},{high}{these[1]}"
    assert rules.equal(gold, f"{those[0]}{low}.0, {high}{those[1]}")[0] is (these == those)
    sign = {"(": "<", "[": "\\le"}[these[0]], {")": "<", "]": "\\le"}[these[1]]
    assert rules.equal(gold, f"{low} {sign[0]} x {sign[1]} {high}")[0]
    assert not rules.equal(gold, f"{these[0]}{low},{high + 1}{these[1]}")[0]


@given(st.lists(WHOLE, min_size=4, max_size=4), st.integers(0, 3))
def test_matrices_entry_by_entry(entries, at):
    def matrix(e, kind="pmatrix"):
        return f"\\begin{{{kind}}} {e[0]} & {e[1]} \\\\ {e[2]} & {e[3]} \\end{{{kind}}}"

    changed = [n + (i == at) for i, n in enumerate(entries)]
    assert rules.equal(matrix(entries), matrix([f"\\frac{{{2 * n}}}{{2}}" for n in entries], "bmatrix"))[0]
    assert not rules.equal(matrix(entries), matrix(changed))[0]


@given(WHOLE, WHOLE, WHOLE, st.integers(2, 9))
def test_equations_up_to_a_factor(a, b, c, k):
    gold = f"{a}x+{b}y={c}".replace("+-", "-")
    scaled = f"{k * a}x+{k * b}y-{k * c}=0".replace("+-", "-").replace("--", "+")
    if a or b:
        assert rules.equal(gold, scaled)[0]
        assert not rules.equal(gold, f"{a}x+{b}y={c + 1}".replace("+-", "-"))[0]


LETTERS = st.sampled_from("xyztab")
WRAPPED = ["{k}{x}", "{x}^2", "-{x}", "\\frac{{1}}{{{x}}}", "{x}+{k}", "\\sin {x}", "{x}y_1", "\\ln {x}", "{x}^{{3}}"]


@given(LETTERS, WHOLE, st.sampled_from(["<", "\\le", ">", "\\ge", "\\ne"]), st.sampled_from(WRAPPED), st.integers(2, 9))
def test_the_side_of_an_inequality_is_the_unknown_itself(x, bound, sign, wrapped, k):
    gold, other = f"{x}{sign}{bound}", f"{wrapped.format(x=x, k=k)}{sign}{bound}"
    if bound:  # 2x > 0 is x > 0
        assert not rules.equal(gold, other)[0]
        assert not rules.equal(f"{{{x}\\mid {gold}}}", other)[0]
    assert rules.equal(gold, f"{k}{x}{sign}{k * bound}")[0] and rules.equal(gold, f"{x}+{k}{sign}{bound + k}")[0]
    assert rules.equal(f"\\{{{x}\\mid {gold}\\}}", f"\\{{t\\mid t{sign}{bound}\\}}")[0]


NAMES = [
    "x",
    "y",
    "f(1)",
    "f(2)",
    "a_n",
    "a_{n+1}",
    "f'(x)",
    "\\sin x",
    "\\log_2 x",
    "\\log_3 x",
    "xy",
    "\\frac{x}{y}",
    "AB",
    "CD",
]


@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True), st.integers(1, 99))
def test_a_value_belongs_to_its_name(names, value):
    gold, other = (f"{name}={value}" for name in names)
    assert rules.equal(gold, gold)[0] and rules.equal(gold, str(value))[0]
    assert not rules.equal(gold, other)[0] and not rules.equal(gold, f"{names[0]}={value + 1}={value}")[0]


@given(st.integers(2, 5000), st.sampled_from(["n", "x"]), st.sampled_from([-1, 1]))
def test_floors_jump_where_they_jump(k, x, step):
    gold = f"\\lfloor\\frac{{{x}}}{{{k}}}\\rfloor"
    assert rules.equal(gold, f"\\lfloor\\frac{{{x}+{k}}}{{{k}}}\\rfloor-1")[0]
    for other in (
        f"\\frac{{{x}}}{{{k}}}",
        f"\\lfloor\\frac{{{x}+({step})}}{{{k}}}\\rfloor",
        f"\\lfloor\\frac{{{x}}}{{{k + step}}}\\rfloor",
        "0",
    ):
        assert not rules.equal(gold, other)[0]


@given(st.integers(1, 10**6), st.sampled_from(["x", "n", "t"]))
def test_an_absolute_value_turns_at_its_number(c, x):
    gold = f"|{x}-{c}|"
    assert rules.equal(gold, f"|{c}-{x}|")[0] and rules.equal(gold, f"\\max({x}-{c},{c}-{x})")[0]
    assert not rules.equal(gold, f"{c}-{x}")[0] and not rules.equal(gold, f"{x}-{c}")[0]
    assert not rules.equal(x, f"\\min({x},{c})")[0]


@given(st.text("HT", min_size=2, max_size=8), st.randoms())
def test_letters_in_another_order_are_another_string(letters, random):
    other = "".join(random.sample(letters, len(letters)))
    for gold in (letters, f"\\text{{{letters}}}"):
        assert rules.equal(gold, f"\\text{{{other}}}")[0] is (letters == other)
        assert rules.equal(gold, other)[0] is (letters == other)


UNITS = ["apples", "cm", "boxes", "years old", "square units", "people", "个", "km/h"]
ARITHMETIC = [
    "halves",
    "fifths",
    "hundredths",
    "million",
    "dozen",
    "factorial",
    "or more",
    "times ten",
    "below zero",
    "倍",
    "次方",
    "以上",
    "squared",
]


@given(st.integers(2, 10**6), st.sampled_from(UNITS), st.sampled_from(ARITHMETIC))
def test_words_behind_a_number_may_count_but_not_reckon(n, unit, word):
    assert rules.equal(str(n), f"{n}\\text{{ {unit}}}")[0]
    assert not rules.equal(str(n), f"{n}\\text{{ {word}}}")[0]


@given(st.integers(1, 999), st.integers(2, 99))
def test_a_percent_sign_never_has_two_readings(a, b):
    value = Fraction(a, b)
    plain, dropped = (rules.equal(fraction(value), f"{fraction(v)}\\%")[0] for v in (100 * value, value))
    assert plain and not dropped
    assert not rules.equal(f"{a}^\\circ", f"{a}\\%")[0] and not rules.equal(f"\\${a}", f"{a}\\%")[0]


@given(
    st.integers(20, 400),
    st.sampled_from(["{g}+{t}", "{g}\\cos({t})", "\\sqrt{{({g})^2+{t}}}", "({g})^{{1+{t}}}", "{g}e^{{{t}}}"]),
)
def test_a_tiny_difference_is_one(digits, spelling):
    tiny, gold = f"10^{{-{digits}}}", "(1+\\sqrt2)"
    assert not rules.equal(gold, spelling.format(g=gold, t=tiny))[0]
    assert not rules.equal("1", f"\\cos({tiny})")[0] and not rules.equal("0", f"e^{{{tiny}}}-1")[0]


PIECES = list("x5{}()[]\\^_$,.|!+-*/=<> \n'%&:;") + (
    "\\frac \\sqrt \\boxed{ \\text{ \\sum_{n=1}^{9} \\begin{pmatrix} \\end{pmatrix} ^{ ** \\pm \\sin 度 ½ \\left( "
    "\\cup \\in \\setminus \\mathbb{R} \\max \\ln \\log_ \\binom \\overline{ \\text{cm} \\text{and} f( \\le e i ! "
    "\ud800 \x00 1e9 \\{ \\}".split(" ")
)
TEXT = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=400)
@given(
    st.one_of(TEXT, st.text(max_size=60)), st.sampled_from(["5", "x^2", "(1,2)", "\\{1,2\\}", "C", "x>1", "1 \\pm 2"])
)
@example("max(max())", "5")
@example("5\\in\\text{0.5}", "5")
def test_grading_is_total(text, gold):
    """Every text gets a verdict; nothing is raised; what is accepted holds something of the gold."""
    for graded in (rules.grade(gold, f"\\boxed{{{text}}}"), rules.grade_text(gold, text)):
        assert graded.outcome in ("correct", "incorrect")
