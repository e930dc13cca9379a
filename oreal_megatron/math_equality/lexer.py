"""Normalised text -> tokens, by tables. Nothing is evaluated; an unknown command is an error, never a guess."""

from __future__ import annotations

import re
from typing import NamedTuple

from oreal_megatron.math_equality import units
from oreal_megatron.math_equality.normalise import closing_braces
from oreal_megatron.math_equality.ordered_letters import is_vector_product, marked_letters
from oreal_megatron.math_equality.upright_text import measured

MAX_CHARS = 4000  # of an answer that is parsed; Python converts integers of up to 4,300 digits
MAX_TOKENS = 1500


class ParseError(ValueError):
    """The text is not mathematics that this grammar knows. Answers are then compared as text."""


class Token(NamedTuple):
    """One token.

    Kinds: num rep atom const fn big frac sqrt ordered op rel open close sep word deg money begin end mod.
    """

    kind: str
    value: str


FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth ln log lg exp sgn gcd lcm max min det "
    "Re Im arg deg dim ker inf sup operatorname asin acos atan abs".split()
)
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega Upsilon ell hbar prime "
    "odot star dagger nabla partial mho aleph bullet square triangle angle imath jmath clubsuit heartsuit "
    "spadesuit diamondsuit oplus wp".split()
)
_RELATIONS = {
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">",
    "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~", "in": "in", "equiv": "equiv", "sim": "sim", "cong": "cong",
    "mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "implies": "=>", "Rightarrow": "=>", "rightarrow": "->",
    "to": "->", "perp": "perp", "parallel": "parallel", "subset": "subset", "subseteq": "subseteq", "notin": "notin",
    "mapsto": "->", "longrightarrow": "->", "iff": "<=>", "Leftrightarrow": "<=>", "propto": "propto",
}  # fmt: skip
_OPERATORS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "pm", "mp": "mp", "cup": "cup", "cap": "cap",
    "bigcup": "cup", "bigcap": "cap", "setminus": "setminus", "backslash": "setminus", "colon": ":", "slash": "/",
}  # fmt: skip
_CONSTANTS = {"pi": "pi", "infty": "inf", "infin": "inf", "emptyset": "empty", "varnothing": "empty"}
_FENCES = {
    "lfloor": ("open", "floor"), "rfloor": ("close", "floor"), "lceil": ("open", "ceil"), "rceil": ("close", "ceil"),
    "langle": ("open", "<"), "rangle": ("close", "<"), "lbrace": ("open", "set"), "rbrace": ("close", "set"),
    "lparen": ("open", "("), "rparen": ("close", ")"), "lbrack": ("open", "["), "rbrack": ("close", "]"),
}  # fmt: skip
_DROPPED = frozenset(
    "mathbf boldsymbol bm mathit mathsf mathcal mathfrak vec hat widehat overrightarrow mathop hbox underline "
    "ensuremath bold mathord mathbin mathstrut strut".split()
)
_TEXT = frozenset(
    "text textbf textit mathrm mbox textrm textnormal textsf texttt operatorname textup emph mathtt".split()
)
_DOTS = frozenset("ldots cdots dots dotsc dotsb dotsm vdots ddots".split())
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+(?![\d.]))?")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]*\d)")
_REPEATING = re.compile(r"(\d*\.\d*)\s*\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?")
_CYCLE_IN_BRACKETS = re.compile(r"(\d*\.)\((\d{1,18})\)")
_WITH_DOTS = re.compile(r"(\d*\.)(\d{3,60})\s*\\(?:ldots|dots|cdots|dotsc)(?![A-Za-z])")
_BETWEEN_DOTS = re.compile(r"(\d*\.\d*)\\dot\s*\{?(\d)\}?\s*(\d{0,20})\s*\\dot\s*\{?(\d)\}?(?!\d)")  # 0.\dot{1}4\dot{2}
_UNIT_BEFORE = re.compile(r"\\(?:text|mathrm)\s*\{[^{}]*\}\s*\\cdot$")
MAX_CYCLE = 12  # digits of a cycle that is read from 0.1212...
_VARIANTS = {"varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta"}
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])")
_NAME = re.compile(r"[A-Za-z]+")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_SYMBOLS = re.compile(r"\*\*|<=|>=|==|!=|<>|->|=>|!!|.", re.DOTALL)
_SYMBOL = {
    "**": ("op", "^"), "<=": ("rel", "<="), ">=": ("rel", ">="), "==": ("rel", "="), "!=": ("rel", "!="),
    "->": ("rel", "->"), "=>": ("rel", "=>"), "!!": ("op", "!!"), "=": ("rel", "="), "<": ("rel", "<"),
    ">": ("rel", ">"), "+": ("op", "+"), "-": ("op", "-"), "*": ("op", "*"), "/": ("op", "/"), "^": ("op", "^"),
    "_": ("op", "_"), "!": ("op", "!"), "%": ("op", "%"), ":": ("op", ":"), "|": ("op", "|"), "(": ("open", "("),
    "[": ("open", "["), "{": ("open", "{"), ")": ("close", ")"), "]": ("close", "]"), "}": ("close", "}"),
    ",": ("sep", ","), ";": ("sep", ";"), "&": ("op", "&"), "'": ("op", "'"),
}  # fmt: skip
_MONEY = {"currency": "dollar", "€": "euro", "£": "pound", "¥": "yuan", "₹": "rupee", "¢": "cent"}
_INNER_MATH = re.compile(r"[-+\d.,:/ ()%]+|\(?[A-Za-z]\)?")
_SEPARATING = re.compile(r"(?:\s|,|;|and|or|或|和|与)+")
COMMANDS = (
    frozenset("frac dfrac tfrac cfrac binom dbinom tbinom sqrt sum prod int lim boxed fbox begin end left".split())
    | frozenset("right overline bar pmod bmod quad qquad not tag".split())
    | FUNCTIONS | _GREEK | _DROPPED | _TEXT | _DOTS | {*_RELATIONS, *_OPERATORS, *_CONSTANTS, *_FENCES}
)  # fmt: skip
SHORT_WORDS = frozenset("cm mm km ft in kg mg mi lb lbs oz yd hr hrs min sec mph pct deg rad ml yes no not is it am pm "
                        "the for odd all set none east west even per old men usd".split())  # fmt: skip


def tokens(text: str, thousands: bool = True) -> list[Token]:
    """Split a normalised answer into tokens. `thousands`: 1,000 is one number outside brackets.

    Raises ParseError for a text that is too long, or holds what no table names.
    """
    if len(text) > MAX_CHARS:
        raise ParseError(f"an answer of {len(text)} characters is not parsed (limit {MAX_CHARS})")
    result: list[Token] = []
    at, fences = 0, 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        new, at = _next_tokens(text, at, thousands and fences == 0)
        for token in new:
            fences += (token.kind == "open" and token.value in "([set") - (
                token.kind == "close" and token.value in ")]set"
            )
        result.extend(new)
        if len(result) > MAX_TOKENS:
            raise ParseError(f"an answer of more than {MAX_TOKENS} tokens is not parsed")
    return result


def _next_tokens(text: str, at: int, thousands: bool) -> tuple[list[Token], int]:
    """Return the tokens of one spelling (usually one, none for a dropped command) and the index behind it."""
    character = text[at]
    if character.isdigit() or character == "." and text[at + 1 : at + 2].isdigit():
        return _number(text, at, thousands)
    if (degree := _DEGREE.match(text, at)) is not None:
        return [Token("deg", "")], degree.end()
    if character == "\\":
        return _command(text, at)
    if (name := _NAME.match(text, at)) is not None:
        return _letters(text, name)
    return _symbol(text, at)


def _symbol(text: str, at: int) -> tuple[list[Token], int]:
    """Return an operator, a relation, a bracket, a currency sign or a word outside ASCII."""
    symbol = _SYMBOLS.match(text, at)
    if symbol is not None and symbol.group() == "!=" and text[:at].rstrip()[-1:].isdigit():
        return [Token("op", "!")], at + 1  # 3! = 6
    if symbol is not None and symbol.group() in _SYMBOL:
        return [Token(*_SYMBOL[symbol.group()])], symbol.end()
    if text[at] in _MONEY:
        return [Token("money", _MONEY[text[at]])], at + 1
    if text[at].isalpha() and (word := _NOT_ASCII.match(text, at)) is not None:
        return [Token("word", word.group())], word.end()
    raise ParseError(f"no meaning known for {text[at]!r}")


def _number(text: str, at: int, thousands: bool) -> tuple[list[Token], int]:
    if not text[at : at + 1].isascii():
        raise ParseError(f"the digit {text[at]!r} is outside ASCII")
    if (between := _BETWEEN_DOTS.match(text, at)) is not None:
        return [
            Token("rep", f"{between.group(1)}|{between.group(2)}{between.group(3)}{between.group(4)}")
        ], between.end()
    if (repeating := _REPEATING.match(text, at) or _CYCLE_IN_BRACKETS.match(text, at)) is not None:
        if text[repeating.end() : repeating.end() + 1].isdigit():
            raise ParseError("digits stand behind a repeating decimal")
        return [Token("rep", f"{repeating.group(1)}|{repeating.group(2)}")], repeating.end()
    dotted = _WITH_DOTS.match(text, at)
    if dotted is not None and (cycle := _cycle(dotted.group(2))):
        return [Token("rep", f"{dotted.group(1)}{dotted.group(2)[: -len(cycle)]}|{cycle}")], dotted.end()
    if thousands and (grouped := _THOUSANDS.match(text, at)) is not None:
        return [Token("num", grouped.group().replace(",", ""))], grouped.end()
    number = _NUMBER.match(text, at)
    if number is None:
        raise ParseError(f"no meaning known for {text[at : at + 8]!r}")
    return [Token("num", number.group())], number.end()


def _cycle(digits: str) -> str:
    """Return the cycle that most digits at the end repeat: three times one digit, twice several; empty without one."""
    best, most = "", 0
    for length in range(1, MAX_CYCLE + 1):
        cycle, times = digits[-length:], 1
        while digits.endswith(cycle * (times + 1)):
            times += 1
        if times >= (3 if length == 1 else 2) and times * length > most:
            best, most = cycle, times * length
    return best


def _letters(text: str, name: re.Match[str]) -> tuple[list[Token], int]:
    """Return a run of letters as a function, a word, or single-letter variables next to each other."""
    run, end = name.group(), name.end()
    lowered = run.lower()
    after_number = text[: name.start()].rstrip()[-1:].isdigit()
    if run in ("min", "sec") and after_number and text[end : end + 2].lstrip()[:1] not in ("(", "\\", "{"):
        return [Token("word", run)], end
    if run in FUNCTIONS and run not in ("inf", "deg", "arg", "dim", "ker", "sup", "det"):
        return [Token("fn", run)], end
    if lowered == "sqrt":
        return [Token("sqrt", "")], end
    if run == "pi":
        return [Token("const", "pi")], end
    if lowered == "usd" and not after_number:
        return [Token("money", "dollar")], end
    if lowered in ("and", "or"):
        return [Token("sep", lowered)], end
    if run == "mod":
        return [Token("mod", "mod")], end
    if after_number and run in units.PLAIN_SYMBOLS:
        return [Token("word", run)], end
    if lowered in ("infinity", "infty"):
        return [Token("const", "inf")], end
    if len(run) >= 4 or lowered in SHORT_WORDS and (len(run) > 2 or after_number):
        return [Token("word", run)], end
    return [_atom(letter) for letter in run], end


def _atom(letter: str) -> Token:
    return Token("const", letter) if letter in "ei" else Token("atom", letter)


def _command(text: str, at: int) -> tuple[list[Token], int]:
    match = _COMMAND.match(text, at)
    if match is None:
        raise ParseError("the text ends in a backslash")
    name, end = match.group(1), match.end()
    if (marked := marked_letters(name, text, end)) is not None:
        return [Token("ordered", f"{marked[0]} {marked[1]}")], marked[2]
    if name in _TEXT:
        return _text(text, name, at, end)
    if name == "times" and is_vector_product(text, at, end):
        return [Token("op", "cross")], end
    if name in ("begin", "end"):
        return _environment(text, name, end)
    if name == "overline" or name == "bar":
        return [Token("fn", "overline")], end
    if name in ("pmod", "bmod", "mod"):
        return [Token("mod", name)], end
    if name in ("mathbb", "Bbb"):
        inner = re.compile(r"\s*\{?\s*([A-Z])\s*\}?").match(text, end)
        if inner is None:
            raise ParseError("\\mathbb has no letter")
        return [Token("const", f"set {inner.group(1)}")], inner.end()
    return _table(name), end


def _table(name: str) -> list[Token]:
    """Return the tokens of a command whose meaning does not depend on what follows."""
    if name in ("frac", "dfrac", "tfrac", "cfrac"):
        return [Token("frac", "/")]
    if name in ("binom", "dbinom", "tbinom"):
        return [Token("frac", "binom")]
    if name == "sqrt":
        return [Token("sqrt", "")]
    for kind, table in (("rel", _RELATIONS), ("op", _OPERATORS), ("const", _CONSTANTS)):
        if name in table:
            value = table[name]
            return [Token("op" if value == "|" else kind, value)]
    if name in _FENCES:
        return [Token(*_FENCES[name])]
    if name in FUNCTIONS:
        return [Token("fn", name)]
    if name in ("sum", "prod", "int", "lim"):
        return [Token("big", name)]
    if name in _GREEK:
        return [Token("atom", "\\" + _VARIANTS.get(name, name))]
    if name in _DOTS:
        return [Token("atom", "...")]
    if name in _MONEY:
        return [Token("money", _MONEY[name])]
    if name in _DROPPED:
        return []
    single = {"{": ("open", "set"), "}": ("close", "set"), "\\": ("op", "\\\\"), "|": ("op", "|"), "_": ("op", "_")}
    if name in single:
        return [Token(*single[name])]
    raise ParseError(f"no meaning known for \\{name}")


def _text(text: str, name: str, start: int, at: int) -> tuple[list[Token], int]:
    r"""Return the tokens of \text{...}: a separator, upright mathematics, a function name, a quantity, or words."""
    while at < len(text) and text[at].isspace():
        at += 1
    if name == "mathrm" and text[at : at + 1].isalpha():
        return [_atom(text[at])], at + 1
    end = closing_braces(text, at).get(at, -1)
    if end < 0:
        raise ParseError(f"\\{name} has no braces")
    inner = text[at + 1 : end].strip()
    if re.fullmatch(r"[a-zA-Z]", inner) and text[at + 1] == " ":
        return [Token("word", inner)], end + 1  # 5\text{ m}: a unit, set apart by its space
    if not inner:
        return [], end + 1
    if _DEGREE.fullmatch(inner):
        return [Token("deg", "")], end + 1
    if _SEPARATING.fullmatch(inner):
        return [Token("sep", inner.strip(" ,;") or ",")], end + 1
    if inner in FUNCTIONS and inner not in ("min", "sec", "deg"):
        return [Token("fn", inner)], end + 1
    if inner in units.SYMBOLS and _behind_number(text, start) and text[end + 1 : end + 2] != "_":
        return [Token("word", inner)], end + 1
    if inner == "mod":
        return [Token("mod", inner)], end + 1
    if _INNER_MATH.fullmatch(inner):
        return tokens(inner), end + 1
    return _quantity(inner), end + 1


def _behind_number(text: str, at: int) -> bool:
    """Return whether a digit, a closing brace or another unit stands directly before `at`; not a degree sign."""
    before = text[:at].rstrip()
    if before.endswith(("\\circ}", "\\circ")):
        return False
    return before[-1:].isdigit() or before[-1:] == "}" or _UNIT_BEFORE.search(before[-40:]) is not None


def _quantity(inner: str) -> list[Token]:
    """Return the tokens of a number with its unit, or of numbers joined by "and"; other texts are one word."""
    try:
        parts = measured(inner) or [("word", inner)]
        return [token for kind, part in parts for token in (tokens(part) if kind == "math" else [Token(kind, part)])]
    except ParseError:
        return [Token("word", inner)]


def _environment(text: str, name: str, at: int) -> tuple[list[Token], int]:
    match = re.compile(r"\s*\{([a-zA-Z]+)\*?\}(?:\s*\{[clr|@ ]*\})?").match(text, at)
    if match is None:
        raise ParseError(f"\\{name} has no name of an environment")
    return [Token(name, match.group(1))], match.end()
