"""Mathematics of the page: formulas are recognised and drawn; nothing but listed elements and attributes passes."""

from __future__ import annotations

import json
import sys

import pytest
import report_run
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.observe.page import formulas


@pytest.fixture(scope="module")
def translate():
    return formulas.translator()


def sources(text: str) -> list[str]:
    return [source for source, _ in formulas.find_formulas(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so $x^2$ and $y$.", ["$x^2$", "$y$"]),
        (r"\(a\), \[b\], $$c$$", [r"\(a\)", r"\[b\]", "$$c$$"]),
        (r"\begin{align*}a&=b\end{align*} then $c$", [r"\begin{align*}a&=b\end{align*}", "$c$"]),
        (r"The answer is \boxed{\frac{1}{2}}.", [r"\boxed{\frac{1}{2}}"]),
        (r"\boxed{\{1, 2\}} and \boxed{3", [r"\boxed{\{1, 2\}}"]),
        ("She pays $5 and he pays $6.", []),
        ("from $5 to $10, then $x$", ["$x$"]),
        (r"costs \$5, and $x = \$7$ more", [r"$x = \$7$"]),
        (r"a line break \\[2pt] and $x$", ["$x$"]),
        ("$a\n\nb$ is in two paragraphs", []),
        ("$$$$ $$ $ \\( \\[ \\begin{align}", []),
        (f"${'x' * formulas.LONGEST_FORMULA}$", []),
    ],
)
def test_formulas_of_a_text(text, expected):
    assert sources(text) == expected


@pytest.mark.parametrize(
    ("latex", "tree"),
    [
        (r"\frac{1}{2}", ["mfrac", ["mrow", ["mn", "1"]], ["mrow", ["mn", "2"]]]),
        ("a<b", [["mi", "a"], ["mo", "<"], ["mi", "b"]]),
        (r"\text{<script>1</script> & x}", ["mtext", "<script>1</script>\xa0&\xa0x"]),
        (r"\href{javascript:alert(1)}{x}", ["mrow", ["mrow", ["mi", "x"]]]),
        (r"\style{position:fixed}{x}", ["mrow", ["mi", "x"]]),
        (r"\class{viewer}{x}", ["mrow", ["mi", "x"]]),
    ],
)
def test_trees_hold_texts_and_no_attribute_that_acts(latex, tree, translate):
    drawn = json.dumps(translate(latex, "inline"))
    inner = json.dumps(tree)
    assert (inner[1:-1] if isinstance(tree[0], list) else inner) in drawn
    assert not any(name in drawn for name in ("href", "style", "class", "javascript"))


@pytest.mark.parametrize(
    "latex",
    [
        "x^", r"\frac{1", r"\left( x", "{", r"\nosuchcommand{x}", r"\def\a{\a\a}\a", r"\newcommand{\a}{b}\a",
        r"\renewcommand{\a}{b}\a", "{" * 500 + "x" + "}" * 500, r"\sqrt{" * 60 + "x" + "}" * 60, "x" * 1001,
    ],
)  # fmt: skip
def test_what_cannot_be_translated_stays_text(latex, translate):
    assert translate(latex, "inline") is None


def test_lengths_that_would_cover_other_texts_are_left_out(translate):
    for latex in (r"a\hspace{-100em}b", r"a\hspace{1000em}b", r"\rule{99em}{99em}"):
        assert "00em" not in json.dumps(translate(latex, "inline")) and "99em" not in json.dumps(
            translate(latex, "inline")
        )
    assert '{"width": "2em"}' in json.dumps(translate(r"a\qquad b", "inline"))


def assert_listed(tree: list[object]) -> None:
    name, *parts = tree
    assert name in formulas.ELEMENTS
    for part in parts:
        if isinstance(part, list):
            assert_listed(part)
        elif isinstance(part, dict):
            assert part.keys() <= formulas.ATTRIBUTES and not any(c in v for v in part.values() for c in ":;(<&\"'")
        else:
            assert isinstance(part, str)


PIECES = (
    *r"{ } [ ] ^ _ & \\ \frac \sqrt \text{ \left( \right) \begin{array}{c} \end{array} \href{ \style{ \class{".split(),
    *r"\color{ \mathrm{ \operatorname{ \unicode \hspace{ \rule \genfrac \substack{ \over \limits \bbox \mathop".split(),
    *report_run.HOSTILE, "x", "1", " ", "'", '"', "<", ">", "#", "%", "\x00", "\ud800", "-9em", "&#x003C;",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_trees_of_hostile_latex_have_listed_names_only(latex):
    tree = TRANSLATE(latex, "block")
    if tree:
        assert_listed(tree)


TRANSLATE = formulas.translator()


@given(st.lists(st.sampled_from((*PIECES, "$", "$$", r"\(", r"\)", r"\[", r"\]", r"\boxed{", "\n")), max_size=30))
def test_formulas_stand_in_the_text_in_their_order(pieces):
    text, start = "".join(pieces), 0
    step = formulas.StepFormulas(TRANSLATE)
    for number in step.in_text(text):
        place = text.find(step.entries[number][0], start)
        assert place >= start
        start = place + len(step.entries[number][0])


def prompt(question: str, gold: object, *responses: str, chosen: int = -1) -> dict:
    rollouts = [{"response": text, "extracted": None} for text in responses]
    if chosen >= 0:
        rollouts[chosen]["chosen"] = {}
    return {"question": question, "gold": gold, "rollouts": rollouts}


def test_a_step_has_each_formula_once_and_answers_need_no_delimiters(translate):
    prompts = [prompt("Solve $x=1$.", r"\frac12", "$x=1$", "no formula"), prompt("$y$ or $x=1$", 7, "$z^$", "plain")]
    prompts[0]["rollouts"][0]["extracted"] = "12"
    drawn = formulas.add_formulas(prompts, translate)
    assert [source for source, _ in drawn] == ["$x=1$", r"\frac12", "$y$"]
    assert prompts[0]["formulas"] == {"question": [0], "gold": [1]} and prompts[1]["formulas"] == {"question": [2, 0]}
    assert [row.get("formulas") for p in prompts for row in p["rollouts"]] == [{"response": [0]}, None, None, None]


def test_beyond_the_limit_of_a_step_mathematics_stays_text_and_trained_on_responses_come_first(translate, monkeypatch):
    monkeypatch.setattr(formulas, "MOST_CHARACTERS", 9)
    prompts = [prompt("$q$", "", "$aa$", "$bb$", chosen=1), prompt("$q$", "", "$cc$")]
    drawn = formulas.add_formulas(prompts, translate)
    assert [source for source, _ in drawn] == ["$q$", "$bb$"]


def test_without_the_library_the_page_says_so_once_and_shows_text(tmp_path, model_folder, monkeypatch, caplog):
    from oreal_megatron.cli import main

    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    runs = [report_run.write(tmp_path / name, model_folder, with_dumps=False) for name in ("one", "two")]
    assert main.main(["report", *map(str, runs), "--html", str(tmp_path / "out.html")]) == 0
    assert [r.getMessage() for r in caplog.records if "latex2mathml" in r.getMessage()] == [
        "mathematics of the rollouts stays LaTeX; to render it: pip install latex2mathml"
    ]
    assert (tmp_path / "out_rollouts/run_0_step_000000.js").read_text().endswith("],[]);\n")
