"""One spelling for gold and prediction: Unicode, delimiters, spacing commands.

String work only, linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = {
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅐": r"\frac{1}{7}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}", "⅑": r"\frac{1}{9}", "⅒": r"\frac{1}{10}",
    "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "∞": r"\infty ", "∅": r"\emptyset ", "±": r"\pm ",
    "∓": r"\mp ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": r"\div ",
    "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≡": r"\equiv ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "°": r"^\circ ",
    "º": r"^\circ ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ",
    "⋯": r"\ldots ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "≅": r"\cong ", "∼": r"\sim ", "∥": r"\parallel ", "⊥": r"\perp ", "∂": r"\partial ",
    "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∠": r"\angle ", "△": r"\triangle ", "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
    "、": ",", "。": ".", "【": "[", "】": "]", "⁄": "/", "∕": "/", "∣": "|", "‖": r"\|", "∗": "*",
    "⟹": r"\implies ", "→": r"\to ", "⇒": r"\implies ", "∧": r"\text{ and }", "∨": r"\text{ or }",
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ϑ": "theta", "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "π": "pi",
    "ρ": "rho", "σ": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
    "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi",
    "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_CHARACTERS.update({letter: f"\\{name} " for letter, name in _GREEK.items()})
_SUPERSCRIPT = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPT = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_INVISIBLE = re.compile("[\ufeff\u200b-\u200f\u2060-\u2064\u00ad]")
_SPECIAL_TOKENS = re.compile(r"<\|[A-Za-z_]{1,24}\|>|</?s>")
_SPACE = re.compile(r"\\\\|\\(?:[,;:!> ]|q?quad|(?:hspace|vspace|hskip|mspace)\*?\{[^{}]*\}|"
                    r"(?:thinspace|enspace|space|newline|nobreakspace)(?![A-Za-z]))|~")  # fmt: skip
_THOUSANDS_GAP = re.compile(r"(?<=\d)(?:\\!|\{,\}\\!|\\!,\\!|\\!,|,\\!|\{,\}|\{,\\!\}|\\[,;: ]|~)\s*(?=\d{3}(?!\d))")
_SIZE = re.compile(
    r"\\\\|\\(?:left|right|middle|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|bigg|Bigg|big|Big)(?![A-Za-z])\s*\.?"
)
_STYLE = re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|large|Large|small|boldmath)"
                    r"(?![A-Za-z])|\\(?:color|textcolor)\s*\{[^{}]*\}|\\(?:label|tag\*?)\{[^{}]*\}")  # fmt: skip
_DELIMITERS = re.compile(r"\\\\|\\[()\[\]](?!\s*\d+(?:\.\d+)?\s*(?:pt|em|ex)\])|\$\$|(?<!\\)\$")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}])")
_ELLIPSES = ("...", "\\ldots", "\\dots", "\\cdots", "…")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ROW_END = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]")
_MODULO = re.compile(r"\(\s*(?:\\(?:text|mathrm)\{\s*mod\s*\}|\\?b?mod\b)\s*([\w{}]{1,20})\s*\)")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_COMMENT = re.compile(r"(?:^|(?<=[{}\s]))%[ \t]*[A-Za-z][^\n]*\n")
_SPACED_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_THOUSANDS_SIGN = re.compile(r"(?<=\d)(?:\{,\}(?:\\!)?|\\!,(?:\\!)?|,\\!|\{,\\!\})(?=\d{3}(?!\d))")
_PRIME = re.compile(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![A-Za-z]))")
_OLD_FRACTION = re.compile(r"\{([^{}\\]*)\\(over|choose)(?![A-Za-z])([^{}]*)\}")
_EMPTY = re.compile(r"(?<=\w)\{\}|\{([-+])\}")
_DOLLARS = re.compile(r"^(\s*-?\s*)\$(?=\s*\d)")  # $5, and no second sign that would make it a formula
# 25^\circ C, 5 \Omega and 5\,\mathrm{k}\Omega as numbers with the name of their unit
_TEMPERATURE = re.compile(
    r"(?<=\d)\s*\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm|rm)\s*\{\s*([CF])\s*\}|([CF])(?![A-Za-z]))"
)
_OHM = re.compile(r"(\s*\$?\s*-?\d[\d.,]*)\s*(?:\\(?:text|mathrm)\s*\{\s*([kM]?)\s*\}|([kM]?))\s*\\Omega(?=[\s.$)}]*$)")
_SCALES = {"C": "celsius", "F": "fahrenheit"}
MAX_WRAPPERS = 8  # boxes within boxes that are removed
_BOX = re.compile(r"^\\(?:boxed|fbox|framebox|mathbox)\s*\{")


def _character(character: str) -> str:
    """Return the LaTeX or ASCII spelling of one character outside ASCII."""
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    return unicodedata.normalize("NFKC", character)


def _script_runs(text: str) -> str:
    """Replace runs of superscripts and subscripts: x²³ -> x^{23}, x₁₂ -> x_{12}."""
    for table, sign in ((_SUPERSCRIPT, "^"), (_SUBSCRIPT, "_")):
        pieces = re.split(f"([{''.join(table)}]+)", text)
        pieces[1::2] = [f"{sign}{{{''.join(map(table.__getitem__, run))}}}" for run in pieces[1::2]]
        text = "".join(pieces)
    return text


def unicode_to_latex(text: str) -> str:
    """Replace characters by ASCII and LaTeX where there is a spelling; leave others unchanged."""
    if text.isascii():
        return text
    text = _script_runs(_INVISIBLE.sub("", text))
    return "".join(c if c < "\x80" else _character(c) for c in text)


def closing_braces(text: str, start: int = 0) -> dict[int, int]:
    """Map the index of every opening brace from `start` to the index of its closing brace, in one pass."""
    pairs: dict[int, int] = {}
    open_at: list[int] = []
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            open_at.append(match.start())
        elif match.group() == "}" and open_at:
            pairs[open_at.pop()] = match.start()
    return pairs


def _unwrap(text: str) -> str:
    """Remove what may surround an answer: a box, bold signs, quotes, trailing punctuation."""
    for _ in range(MAX_WRAPPERS):
        before = text
        text = _without_tail(text.strip())
        if box := _BOX.match(text):
            end = closing_braces(text).get(box.end() - 1, -1)
            if end == len(text) - 1:
                text = text[box.end() : end]
        if text[:2] == text[-2:] in ("**", "__") and len(text) > 4:
            text = text[2:-2]
        if text[:1] == text[-1:] in ('"', "`") and len(text) > 2:
            text = text[1:-1]
        if text == before:
            break
    return text


def _without_tail(text: str) -> str:
    """Remove trailing punctuation and row ends; an ellipsis is part of the answer."""
    if text[-1:].isalnum() or text[-1:] == "}":
        return text
    while not text.endswith(_ELLIPSES):
        shorter = text.rstrip(" \t\r\n.,;:。，；")
        shorter = shorter[:-2] if shorter.endswith("\\\\") else shorter
        if shorter == text:
            break
        text = shorter
    return text


def _replace_except_row_ends(pattern: re.Pattern[str], text: str, by: str) -> str:
    r"""Replace every match by `by`; a row end \\, which the pattern matches so as not to split it, stays."""

    def replacement(match: re.Match[str]) -> str:
        return "\\\\" if match.group() == "\\\\" else by

    return pattern.sub(replacement, text)


def _old_fractions(text: str) -> str:
    r"""Rewrite TeX's old commands: {14 \over 3} -> \frac{14}{3}, {n \choose k} -> \binom{n}{k}, \cr -> \\."""
    if "\\over" not in text and "\\choose" not in text and "\\cr" not in text:
        return text
    names = {"over": "frac", "choose": "binom"}
    text = re.sub(r"\\cr(?![A-Za-z])", r"\\\\", text)
    text = text if "{" in text else f"{{{text}}}"
    return _OLD_FRACTION.sub(lambda m: f"\\{names[m.group(2)]}{{{m.group(1)}}}{{{m.group(3)}}}", text)


def _ohms(text: str) -> str:
    r"""Name the unit of a resistance: 5\,\Omega -> 5 \text{ ohm}; 1+2\Omega stays."""
    match = _OHM.match(text)
    return text if match is None else rf"{match[1]} \text{{ {match[2] or match[3] or ''}ohm}}{text[match.end() :]}"


def normalise(text: str) -> str:
    """Return the spelling in which both sides are compared and parsed."""
    text = unicode_to_latex(_SPECIAL_TOKENS.sub("", text) if "<" in text else text)
    if text.count("$") == 1:
        text = _DOLLARS.sub(r"\1\\$", text)
    text = (_THOUSANDS_SIGN.sub("", text) if "," in text else text).replace("...", r"\ldots ")
    if "%" in text and "\n" in text:
        text = _COMMENT.sub("", text)
    if "10" in text:
        text = _TIMES_TEN.sub(r"\\times ", text)
    if "\\" in text:
        text = _old_fractions(_PRIME.sub("'", text))
        if "\\begin" not in text:
            text = _DOUBLED.sub(r"\\", text)  # "\\frac" escaped twice; in a matrix \\ ends a row
        text = _ROW_END.sub(r"\\\\", text)
        text = _replace_except_row_ends(_SIZE, _STYLE.sub("", text), "")
        text = text.replace(r"\$", " \\currency ").replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
        text = _replace_except_row_ends(_SPACE, _THOUSANDS_GAP.sub(",", text), " ")
        if "circ" in text:
            text = _TEMPERATURE.sub(lambda match: rf" \text{{ {_SCALES[match[1] or match[2]]}}}", text)
        if "Omega" in text:
            text = _ohms(text)
    text = text.replace("~", " ")
    text = _EMPTY.sub(r"\1", text) if "{" in text else text
    if "mod" in text:
        text = _MODULO.sub(r"\\pmod{\1}", text)
    missing = text.count("{") - text.count("}")
    if 0 < missing <= 3:
        text += "}" * missing  # the answer was cut before its last brace
    text = _unwrap(text)
    if "$" in text or "\\" in text:
        text = _unwrap(_replace_except_row_ends(_DELIMITERS, text, " "))
    return text.replace(" ", ",") if _SPACED_THOUSANDS.fullmatch(text) else text
