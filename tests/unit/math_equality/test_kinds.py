"""Properties of kinds of answers: letters with an order, nested sets, derivatives, units, roundings, sentences."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.math_equality import equal, equals_itself, grade, grade_text

POINTS = st.permutations("ABCDE").map(lambda points: "".join(points[:3]))
MARKS = [r"\angle %s", r"m\angle %s", r"\angle{%s}", r"\widehat{%s}", r"\sin\angle %s", r"2\angle %s", r"\angle %s + 1"]


@given(POINTS, st.permutations([0, 1, 2]), st.sampled_from(MARKS))
def test_an_angle_has_its_corner_in_the_middle(points, order, mark):
    other = "".join(points[i] for i in order)
    assert equal(mark % points, mark % other)[0] is (other in (points, points[::-1]))


@given(
    POINTS, st.sampled_from([r"\overrightarrow{%s}", r"\vec{%s}", r"\frac12\vec{%s}", r"\overrightarrow{%s}+\vec c"])
)
def test_a_vector_has_a_direction(points, mark):
    assert not equal(mark % points[:2], mark % points[1::-1])[0]
    assert equal(mark % points[:2], mark.replace("overrightarrow", "vec") % points[:2])[0]
    assert equal(f"|\\vec{{{points[:2]}}}|", f"|\\vec{{{points[1::-1]}}}|")[0]


@given(st.lists(st.sampled_from("abc12"), min_size=2, max_size=4).map("".join), st.randoms())
def test_digits_under_a_line_have_their_places(digits, random):
    other = "".join(random.sample(digits, len(digits)))
    if digits.isdigit():
        return
    assert equal(rf"\overline{{{digits}}}", rf"\overline{{{other}}}")[0] is (digits == other)


@pytest.mark.parametrize(
    "mark", [r"\vec{%s}", r"\mathbf{%s}", r"\vec %s", r"\boldsymbol{%s}", r"\hat{%s}", r"\overrightarrow{O%s}"]
)
def test_a_vector_product_changes_its_sign(mark):
    a, b = mark % "a", mark % "b"
    assert not equal(rf"{a}\times {b}", rf"{b}\times {a}")[0] and equal(rf"{a}\times {b}", rf"-{b}\times {a}")[0]
    assert equal(rf"{a}\cdot {b}", rf"{b}\cdot {a}")[0] and equal(f"{a}+{b}", f"{b}+{a}")[0]


@given(st.permutations([0, 1, 2]), st.permutations([0, 1, 2]), st.sampled_from([r"\cong", r"\sim"]))
def test_corners_of_congruent_triangles_belong_together(first, second, sign):
    gold = rf"\triangle ABC {sign} \triangle DEF"
    other = rf"\triangle {''.join('ABC'[i] for i in first)} {sign} \triangle {''.join('DEF'[i] for i in second)}"
    assert equal(gold, other)[0] is (first == second)


@pytest.mark.parametrize("letters", ["abc", "pqr", "xyz", "mnp", "rst"])
def test_small_letters_that_are_no_word_are_a_product(letters):
    for other in map("".join, itertools.permutations(letters)):
        assert equal(letters, other)[0]
    assert not equal(letters, letters + letters[0])[0] and not equal("was", "saw")[0] and not equal("HTT", "TTH")[0]


def nested(random, depth=2):
    """Return a random number, or a set of such items."""
    if depth == 0 or random.random() < 0.5:
        return random.randint(1, 3)
    return frozenset(nested(random, depth - 1) for _ in range(random.randint(1, 3)))


def written(item, random):
    if isinstance(item, int):
        return str(item)
    return r"\{" + ",".join(random.sample([written(part, random) for part in item], len(item))) + r"\}"


@given(st.randoms(use_true_random=False))
def test_sets_keep_their_nesting(random):
    gold, other = (frozenset([7, nested(random), nested(random)]) for _ in range(2))
    assert equal(written(gold, random), written(gold, random))[0]
    assert equal(written(gold, random), written(other, random))[0] is (gold == other)
    assert not equal(written(gold, random), written(frozenset([gold]), random))[0]


@pytest.mark.parametrize("d", ["d", r"\partial ", r"\Delta ", r"\mathrm{d}"])
@pytest.mark.parametrize(("top", "bottom"), [("y", "x"), ("f", "t"), ("^2y", "x^2"), ("", "x")])
def test_a_derivative_is_no_quotient(d, top, bottom):
    derivative = rf"\frac{{{d}{top}}}{{{d}{bottom}}}"
    plain = rf"\frac{{{top.removeprefix('^2') or 1}}}{{{bottom}}}"
    assert equal(derivative, derivative)[0] and not equal(derivative, plain)[0] and not equal(plain, derivative)[0]
    assert equal(rf"\frac{{{top.removeprefix('^2') or 1}d}}{{{bottom}d}}", plain)[0]  # d as a factor cancels


UNITS = ["students", "cm", "miles", "degrees", "square units", "dollars", "N", "J", "kPa", "hours", "m/s"]


@given(st.integers(2, 5000), st.sampled_from(UNITS), st.sampled_from(["text", "mbox", "textbf", "mathrm"]))
def test_a_number_and_its_unit_may_share_one_text(n, unit, command):
    answer = rf"\{command}{{{n} {unit}}}"
    assert equal(str(n), answer)[0] and equal(answer, str(n))[0] and equal(rf"{n}\text{{ {unit}}}", answer)[0]
    assert not equal(str(n + 1), answer)[0] and not equal(str(n), rf"\text{{about {n} {unit}}}")[0]
    assert not equal(str(n), rf"\text{{{n} {unit} or more}}")[0]


SYMBOLS = {
    "N": "newtons",
    "J": "joules",
    "V": "volts",
    "W": "watts",
    "Hz": "hertz",
    "Pa": "pascals",
    "A": "amperes",
    "mol": "moles",
}


@given(st.integers(-40, 500), st.sampled_from("CF"))
def test_degrees_of_a_temperature_are_a_unit(n, scale):
    name, other = {"C": ("Celsius", "F"), "F": ("Fahrenheit", "C")}[scale]
    gold = rf"{n}^\circ {scale}"
    same = [
        rf"{n}^{{\circ}}\text{{{scale}}}",
        rf"{n}\,^\circ\mathrm{{{scale}}}",
        f"{n}°{scale}",
        f"{n} °{scale}.",
        str(n),
    ]
    for answer in (*same, rf"{n}\text{{ degrees {name}}}"):
        assert equal(gold, answer)[0] and equal(answer, gold)[0], answer
    assert not equal(gold, rf"{n}^\circ {other}")[0] and not equal(gold, rf"{n + 1}^\circ {scale}")[0]


@given(st.integers(1, 500))
def test_a_resistance_has_a_unit_and_other_omegas_are_letters(n):
    for answer in (rf"{n}\,\Omega", rf"{n} \Omega", f"{n}Ω", rf"{n}\text{{ ohms}}"):
        assert equal(rf"{n}\ \Omega", answer)[0] and equal(str(n), answer)[0], answer
    assert equal(rf"{n}\,k\Omega", rf"{n}000\,\Omega")[0] and not equal(rf"{n}\,k\Omega", rf"{n}\,\Omega")[0]
    assert equal(rf"{n}+2\Omega", rf"2\Omega+{n}")[0] and not equal(rf"{n}+2\Omega", str(n + 2))[0]


@pytest.mark.parametrize("text", [r"\text{12 cm$^2$}", r"\text{12 m$^{3}$}", r"\text{$12$ cm}", r"\text{12 cm}^2"])
def test_a_formula_within_the_text_of_a_unit(text):
    assert equal("12", text)[0] and equals_itself(text) and not equal("13", text)[0]


@given(st.integers(1, 99), st.sampled_from(sorted(SYMBOLS)), st.sampled_from(sorted(SYMBOLS)))
def test_physical_units_are_units(n, unit, other):
    gold = rf"{n}\text{{ {unit}}}"
    for answer in (
        rf"{n}\,\mathrm{{{unit}}}",
        rf"{n}\ \text{{{unit}}}",
        rf"{n} \text{{ {SYMBOLS[unit]}}}",
        f"{n}000 \\text{{ m{unit}}}",
        str(n),
    ):
        assert equal(gold, answer)[0], answer
    assert equal(str(n), gold)[0] and not equal(gold, rf"{n}\text{{ k{unit}}}")[0]
    assert equal(gold, rf"{n}\text{{ {other}}}")[0] is (unit == other)


@given(st.sampled_from([r"\sqrt{%s}", r"%s\pi", r"\frac{%s}{7}", r"\ln %s"]), st.integers(2, 90), st.integers(1, 4))
def test_a_value_may_be_followed_by_its_rounding(template, n, places):
    import mpmath

    exact = {"\\sq": mpmath.sqrt(n), "%s\\": n * mpmath.pi, "\\fr": mpmath.mpf(n) / 7, "\\ln": mpmath.log(n)}[
        template[:3]
    ]
    gold, rounding, wrong = template % n, f"{float(exact):.{places}f}", f"{float(exact) + 3 * 10**-places:.{places}f}"
    for text in (
        r"{} \approx {}",
        r"{} \text{{ (approximately {})}}",
        r"{} \approx {} \text{{ cm}}",
        r"{} (\approx {})",
        r"{}, \text{{ or about }} {}",
    ):
        assert equal(gold, text.format(gold, rounding))[0], text
        assert not equal(gold, text.format(gold, wrong))[0], text
    assert not equal(rf"\sqrt{{{n}}} + 1", rf"{gold} \approx {rounding}")[0]


@given(st.integers(1, 10**6), st.integers(2, 10**4))
def test_a_double_stands_for_the_number_it_is_nearest_to(top, bottom):
    double = repr(top / bottom)
    if len(double.replace(".", "").strip("0")) < 16 or "e" in double:
        return
    gold = rf"\frac{{{top}}}{{{bottom}}}"
    assert equal(gold, double)[0] and equal(gold, f"{top / bottom:.17g}")[0]
    assert not equal(gold, repr(top / bottom * (1 + 1e-11)))[0]


SENTENCES = [
    r"\text{{The answer is }} {}",
    "The final answer is {}",
    r"\text{{Answer: }}{}",
    r"{} \text{{ is the answer}}",
    "So the answer is {}.",
    r"\text{{The area is }} {}",
    r"\text{{There are }} {} \text{{ ways}}",
    r"\text{{Therefore, }} {}",
    r"{} \text{{ (since }} x>0)",
]


@given(st.integers(3, 999), st.sampled_from(SENTENCES))
def test_an_answer_may_be_a_sentence(n, sentence):
    assert grade(str(n), rf"\boxed{{{sentence.format(n)}}}").outcome == "correct"
    assert grade(str(n + 1), rf"\boxed{{{sentence.format(n)}}}").outcome == "incorrect"
    for other in (f"not {n}", f"{n} or {n + 1}", rf"\frac{{1}}{{{n}}}"):
        assert grade(str(n), rf"\boxed{{{sentence.format(other)}}}").outcome == "incorrect"
    assert grade(str(n), rf"\boxed{{{n}, not {n + 1}}}").outcome == "correct"
    assert grade(str(n + 1), rf"\boxed{{{n}, not {n + 1}}}").outcome == "incorrect"


LABELS = [
    "**Final Answer**\n\n{}",
    "**Final Answer**: ${}$",
    "**Answer**: {}",
    "### Final Answer\n{}",
    "**Step 1**: add.\n\nSo the result is {}.",
]


@given(st.integers(0, 999), st.sampled_from(LABELS))
def test_a_bold_label_is_no_answer(n, text):
    assert grade_text(str(n), text.format(n)).outcome == "correct"
    assert grade_text(str(n + 1), text.format(n)).outcome == "incorrect"


@pytest.mark.parametrize(
    ("end", "begin"), [("</think>", "<think>"), ("[/THINK]", "[THINK]"), ("<|end_of_thought|>", "<|begin_of_thought|>")]
)
def test_thinking_that_never_ends_holds_no_answer(end, begin):
    for text in (rf"{begin}\boxed{{4}} let me check", rf"{begin}a{end} {begin} \boxed{{4}}"):
        assert grade("4", text, True, (end,)) == ("incorrect", "no answer", None)
    for text in (rf"{begin}a{end} \boxed{{4}}", rf"a{end} \boxed{{4}}", r"\boxed{4}"):
        assert grade("4", text, True, (end,)).outcome == "correct"


@pytest.mark.parametrize(
    "form",
    [
        ", k \\in \\mathbb{{Z}}",
        r" \text{{ where }} k \text{{ is an integer}}",
        r" (k\in\mathbb{{Z}})",
        r" \text{{ for any integer }} k",
        "",
    ],
)
def test_an_integer_parameter_may_be_left_out(form):
    gold, answer = r"x=\frac{\pi}{2}+k\pi, k\in\mathbb{Z}", r"x=\frac{\pi}{2}+k\pi" + form.format()
    assert equal(gold, answer)[0] and equal(answer, gold)[0] and equal(gold, gold.replace("k", "n"))[0]
    assert not equal(gold, answer.replace("k\\pi", "2k\\pi"))[0]


@given(st.integers(1, 10**6 - 1), st.integers(1, 6), st.integers(0, 99))
def test_repeating_decimals_in_every_notation(cycle, length, head):
    digits = f"{cycle % 10**length:0{length}d}"
    gold = rf"{head}+\frac{{{int(digits)}}}{{{10**length - 1}}}"
    answers = [
        rf"{head}.\overline{{{digits}}}",
        f"{head}.({digits})",
        rf"{head}.{digits * 3}\ldots",
        f"{head}.{digits * 3}...",
    ]
    for answer in answers:
        assert equal(gold, answer)[0], answer


@given(st.integers(1, 10**6), st.integers(2, 99))
def test_a_remainder_is_a_number(a, b):
    assert equal(str(a % b), rf"{a} \bmod {b}")[0] and not equal(str(a % b + 1), rf"{a} \bmod {b}")[0]
    assert equal(rf"x \equiv {a} \pmod {{{b}}}", rf"x \equiv {a} (\bmod {b})")[0]
