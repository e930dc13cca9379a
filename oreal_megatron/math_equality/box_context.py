r"""Read what stands around a box and changes its value: -\boxed{5}, \frac{\boxed{5}}{2}, \boxed{5} million.

The expression around a box ends at the next relation, separator, word or end of the formula. String work only, on at
most WINDOW characters of each side.
"""

from __future__ import annotations

import re

WINDOW = 160  # characters read on each side of a box
_KNOWN = (
    r"(?:[dtc]?frac|sqrt|[dt]?binom|times|cdot|ast|div|pm|mp|pi|infty|left|right|[bB]igg?[lr]?|displaystyle|circ|degree|"
    r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|lg|exp|alpha|beta|gamma|theta|lambda|phi|varphi|omega|boxed|"
    r"fbox|mathbf|boldsymbol|bm|underline|lfloor|rfloor|lceil|rceil|overline|bar|currency)(?![A-Za-z])"
)
_STOP = re.compile(
    r"\n|(?<!\\)\$|\\[()\[\]]|\\\\|(?<!\\)[&=<>:;,?|\"“”…。，、：；]|\.(?!\d)|[^\x00-\x7f−–×·÷√°²³½⁰-⁹⁻]|"
    r"\\(?:text[a-z]*|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\(?:begin|end)\s*\{[^{}]*\}|"
    rf"\\(?!{_KNOWN})[A-Za-z]+|(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|ln)(?![A-Za-z]))[A-Za-z]{{2,}}"
)
_CLEAR = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed|fbox|mathbf|boldsymbol|bm|underline)(?![A-Za-z])|"
    r"\\[,;:! ]|\*\*|__|~|`"
)
_OPERATOR = r"(?:[-+*/^_−–×·÷]|\\(?:times|cdot|ast|div|pm|mp)(?![A-Za-z]))"
_TIMES = re.compile(r"^\s*[xX]\s*(?=10\s*\^)")
_LEADING = re.compile(r"(?:\s|[*/^_×·÷]|\\(?:times|cdot|ast|div)(?![A-Za-z]))*")
_TRAILING = re.compile(rf"(?:\s|{_OPERATOR})*$")
# a space between two operands; in prose the first of them is not part of the expression
_GAP = re.compile(
    rf"(?<![-+*/^_−–×·÷\s])(?<!times)(?<!cdot)(?<!div)(?<!pm)\s+(?!\s|{_OPERATOR}|[!)}}\]]|\\r(?:floor|ceil|ight)|$)"
)
_BEHIND_COMMAND = re.compile(r"(\\[A-Za-z]+)\s+")
_NOTHING = re.compile(r"[\s({\[+]*")
_NOTHING_BEHIND = re.compile(r"[\s)}\]]*")
_LETTERS = re.compile(r"(?=\w{4,}$)\w*[A-Za-z]\w*$")  # touching a box in prose: 7v9v is no factor, 2x may be one
_DASH = re.compile(r"\s*[-–−]\s+$")
_COPULA = re.compile(r"\b(?:is|are|be|equals?|get|gives?|obtain|or|and|by|to)\s*$|[=≈]\s*$")
_PAIRS = {")": "(", "}": "{", "]": "[", "\\}": "\\{", "\\rfloor": "\\lfloor", "\\rceil": "\\lceil"}
_BRACKET = re.compile(r"\\[lr](?:floor|ceil)|\\.|[(){}\[\]]", re.DOTALL)

_BETWEEN = r"(?:\s|\$|\\[()\[\]]|\*\*|__|~~)*"  # what may stand between a word and a box
_BETWEEN_BEHIND = r"(?:[ \t]|\$|\\[()\[\]]|\*\*|__|~~)*"  # on the same line
_NEGATION = (
    r"(?:\b(?:not|never|nor|neither|cannot|unlike|except)|n't|n’t|\b(?:rather\s+than|instead\s+of|other\s+than|"
    r"different\s+from|no\s+longer))"
)
_FILLER = (
    r"(?:\s+(?:be|equal(?:\s+to)?|the(?:\s+correct)?\s+answer|simply|just|exactly|really|actually|necessarily)){0,3}"
)
_DENIED = re.compile(
    rf"(?:{_NEGATION}{_FILLER}|\b(?:wrong|incorrect)\s+answer(?:\s+(?:is|would\s+be))?\s*:?|不是|不等于|并非|不为|而非|\\neq?(?![A-Za-z])|≠|(?<![\w)}}])!=|\\not\s*=?|~~|\\(?:[bx]?cancel|sout)\s*\{{)"
    rf"{_BETWEEN}(?:\$?\s*[A-Za-z]\w?\s*=\s*)?{_BETWEEN}$"
)
_DENIED_BEHIND = re.compile(
    rf"{_BETWEEN_BEHIND}(?:(?:is|was|are|would\s+be|must\s+be|seems)\s+(?:clearly\s+|obviously\s+|also\s+)?"
    r"(?:wrong|incorrect|false|impossible|invalid|not\s+(?:the\b|correct|right|it\b|valid|possible|my\b|our\b|what\b|equal))|"
    r",?\s*(?:but|which)\s+(?:(?:that|this|it)\s*)?(?:'s|is|was)\s+(?:wrong|incorrect|not\s+(?:right|correct))|"
    r"(?:is|was|ca)n't\s+(?:the\b|correct|right|it\b|valid|be\b|my\b)|不是|不对|是错|"
    r"[?.!;,]*\s*(?:[Nn]o|[Nn]ope|[Ww]ait|[Ss]orry|[Hh]mm)[,.!\s]+(?:that|this|it)(?:\s+(?:is|was)|'s)\s+"
    r"(?:wrong|incorrect|false|not\s+(?:right|correct)|a\s+mistake)|"
    r"[?.!;,]*\s*(?:[Hh]owever|[Bb]ut|[Aa]ctually|[Nn]o|[Ss]orry)[,\s]+(?:the|my)\s+(?:correct|right|true|actual|real)\s+"
    r"(?:answer|value|result)\s+(?:is|should\s+be|must\s+be))"
)
_BAR_BEFORE = re.compile(r"(?:\\left\s*)?(?:\||\\[lr]?vert(?![A-Za-z]))\s*$")
_BAR_BEHIND = re.compile(r"\s*(?:\\right\s*)?(?:\||\\[lr]?vert(?![A-Za-z]))")
_RATIO_BEFORE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?\s*:\s*$")
_RATIO_BEHIND = re.compile(r":\d+(?:\.\d+)?(?![\w.]*\w)")
_SCALE_BEFORE = re.compile(
    r"\b(negative|minus|(?:opposite|reciprocal|inverse|negative)\s+of|twice|thrice|double|half(?:\s+of)?|triple|one\s+(?:half|third)\s+of|(?:square|cube)(?:\s+root)?\s+of|负)"
    rf"(\s+|(?<=负)){_BETWEEN}$",
    re.IGNORECASE,
)
_SCALES = (
    r"(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?(?![A-Za-z])(?:\s+(?!(?:is|are|and|or|as|in)\b)[A-Za-z]+)?|"
    r"halves|thirds|fourths|fifths|sixths|eighths|tenths|hundredths|thousandths|factorial|squared|cubed|percent|per\s+cent|pct|"
    r"or\s+(?:more|less|fewer|greater|above|below)|and\s+(?:above|below|more)|times\s+(?:ten|\d+)|plus\s+\w+|minus\s+\w+|"
    r"to\s+the\s+(?:power|\w+th)|[千百万亿倍半%]"
)
_SCALE_BEHIND = re.compile(
    rf"({_BETWEEN_BEHIND}(?:\\[,;: ]|~)*(?:\\(?:text[a-z]*|mathrm|mbox)\s*\{{)?[ \t]*)({_SCALES})(?![A-Za-z])"
)
_OR_BEHIND = re.compile(
    rf"{_BETWEEN_BEHIND}(?:\\text\s*\{{)?[ \t]*\bor\b\s*\}}?{_BETWEEN}(?P<other>-?\d+(?:\.\d+)?(?:/\d+)?)(?![\d.]*\w)"
)


def denied(text: str, start: int, end: int) -> bool:
    r"""Return whether the words around a box say that it is not the answer: "not \boxed{5}", "\boxed{5} is wrong"."""
    behind = text[end : end + WINDOW]
    return bool(_DENIED.search(text[max(0, start - WINDOW) : start]) or _DENIED_BEHIND.match(behind))


def in_context(text: str, start: int, end: int, content: str) -> str:
    """Return the content of the box text[start:end] with the operators around it; unchanged where there are none."""
    if content.strip().isalpha() and len(content.strip()) > 1:
        return content  # words
    before, behind = text[max(0, start - WINDOW) : start].rstrip("\\"), text[end : end + WINDOW]
    if bars := _bars(text, start, before, behind):
        return in_context(text, start - bars[0], end + bars[1], f"\\left|{content}\\right|")
    left, right = _balanced(_left_part(before), _right_part(behind))
    math = bool(left.strip() or right.strip()) and _in_formula(text, start)
    left, right = _CLEAR.sub(" ", left), _CLEAR.sub(" ", right)
    if not left.strip() and (ratio := _RATIO_BEFORE.search(before)) is not None and _in_formula(text, start):
        left, math = ratio.group(), True
    left, right = _left_operators(left, before, math), _right_operators(right, content, math)
    words = _words(before, behind) if not left and not right.strip(")}] ") else None
    if _NOTHING.fullmatch(left) and _NOTHING_BEHIND.fullmatch(right):
        left = right = ""
    if words:
        return words[0] + content + words[1]
    if not left and not right:
        return content
    simple = re.fullmatch(r"\d+|[A-Za-z]", content.strip()) and not re.search(r"[\d.A-Za-z]\s*$", left)
    return f"{left}{content.strip() if simple else f'{{{content}}}'}{right}".strip()


def _bars(text: str, start: int, before: str, behind: str) -> tuple[int, int] | None:
    """Return the lengths of the bars of an absolute value around a box; None without, and in a row of a table."""
    left, right = _BAR_BEFORE.search(before), _BAR_BEHIND.match(behind)
    if left is None or right is None:
        return None
    line = text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0]
    alone = line.count("|") <= 2 and not left.group()[-1].isspace()
    return (len(left.group()), right.end()) if alone or _in_formula(text, start) else None


def _left_part(before: str) -> str:
    """Return the text behind the last stop. A number that touches the opening dollar, or a minus, is part of it."""
    stop = max(_STOP.finditer(before), key=lambda match: match.end(), default=None)
    if stop is None:
        return before
    left = before[stop.end() :]
    if stop.group() in ("$", "\\(") and not left.strip():
        outer = before[: stop.start()]
        if dash := _DASH.search(outer):
            return "-" if _COPULA.search(outer[: dash.start()]) else left
        sign = re.search(r"(?:(?<=[\s(:=$])|^)[-−]$|(?:(?<=[\s(])|^)\d+(?:\.\d+)?$", outer)
        return sign.group() if sign else left
    return left


def _right_part(behind: str) -> str:
    """Return the text in front of the first stop; digits behind a thousands comma are part of it."""
    if thousands := re.match(r"(?:,\d{3})+(?!\d)", behind):
        return thousands.group()
    if ratio := _RATIO_BEHIND.match(behind):
        return ratio.group()
    behind = _TIMES.sub(r"\\times ", behind)
    stop = _STOP.search(behind)
    return behind[: stop.start()] if stop else behind


def _balanced(left: str, right: str) -> tuple[str, str]:
    """Return both parts without brackets that only one of them opens or closes."""
    opened: list[tuple[str, int, int]] = []
    for bracket in _BRACKET.finditer(left):
        sign = bracket.group()
        if sign in _PAIRS.values():
            opened.append((sign, bracket.start(), bracket.end()))
        elif sign in _PAIRS and opened and opened[-1][0] == _PAIRS[sign]:
            opened.pop()
        elif sign in _PAIRS:
            opened = [("cut", bracket.end(), bracket.end())]
    start = opened[0][1] if opened and opened[0][0] == "cut" else 0
    opened = [bracket for bracket in opened if bracket[0] != "cut"]
    inner: list[int] = []
    end = len(right)
    for bracket in _BRACKET.finditer(right):
        sign = bracket.group()
        if sign in _PAIRS.values():
            inner.append(bracket.start())
        elif sign in _PAIRS and inner:
            inner.pop()
        elif sign in _PAIRS and opened and opened[-1][0] == _PAIRS[sign]:
            opened.pop()
        elif sign in _PAIRS:
            end = bracket.start()
            break
    end = min([end, *inner])
    start = opened[-1][2] if opened else start
    return left[start:], right[:end]


def _left_operators(left: str, before: str, math: bool) -> str:
    """Return the operators and operands in front of a box; without those that are prose."""
    left = _BEHIND_COMMAND.sub(r"\1~", left)  # the space of "\ln 5" is no gap
    if not math:
        if _LETTERS.search(left):
            return ""
        gaps = [gap.end() for gap in _GAP.finditer(left + "5")]  # 5 stands for the box
        left = left[gaps[-1] :] if gaps else left
        if _DASH.fullmatch(left) and not _COPULA.search(before[: before.rfind(left)]):
            return ""  # a bullet, or a dash between words
    return left[_LEADING.match(left).end() :]  # type: ignore[union-attr]  # matches any text


def _right_operators(right: str, content: str, math: bool) -> str:
    """Return the operators and operands behind a box; without those that are prose."""
    if not math and (gap := _GAP.search("5" + right)) is not None:
        right = right[: gap.start() - 1]
    if right.startswith("!") and re.fullmatch(r"\s*[A-J]\s*", content):
        return ""
    return right[: _TRAILING.search(right).start()]  # type: ignore[union-attr]  # matches any text


def _words(before: str, behind: str) -> tuple[str, str] | None:
    """Return the words before and behind a box that change its value: negative, million, or 6."""
    if (other := _OR_BEHIND.match(behind)) is not None:
        return "", rf" \text{{ or }} {other['other']}"
    if (word := _SCALE_BEHIND.match(behind)) is not None:
        return "", "\\%" if word[2] == "%" else rf" \text{{ {word[2]}}}"
    if (word := _SCALE_BEFORE.search(before)) is not None:
        return ("-" if word[1] in ("negative", "minus", "负") else rf"\text{{{word[1]} of }} "), ""
    return None


def _in_formula(text: str, start: int) -> bool:
    """Return whether a box stands inside dollars, brackets of a formula or an environment."""
    line = text[text.rfind("\n", 0, start) + 1 : start].replace("$$", "$")
    if line.count("$") - line.count("\\$") & 1:
        return True
    near = text[max(0, start - 10 * WINDOW) : start]
    return text.count("$$", 0, start) % 2 == 1 or any(
        near.rfind(opening) > near.rfind(closing)
        for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("\\begin{", "\\end{"))
    )
