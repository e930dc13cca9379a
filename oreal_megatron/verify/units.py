"""Units and the words that follow a number: which of them name the same quantity."""

from __future__ import annotations

import re
from fractions import Fraction

_LENGTH = {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000", "inch": "127/5000", "foot": "381/1250",
           "yard": "1143/1250", "mile": "201168/125"}  # fmt: skip
_TIME = {"second": "1", "minute": "60", "hour": "3600", "day": "86400", "week": "604800"}
_MASS = {"mg": "1/1000", "g": "1", "kg": "1000"}
_MONEY = {"cent": "1/100", "dollar": "1"}
_VOLUME = {"ml": "1/1000", "liter": "1"}
_FACTORS = {
    name: (dimension, Fraction(factor))
    for dimension, table in (
        ("length", _LENGTH),
        ("time", _TIME),
        ("mass", _MASS),
        ("money", _MONEY),
        ("volume", _VOLUME),
    )
    for name, factor in table.items()
}
_SYNONYMS = {
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "decimeter": "dm", "meter": "m",
    "metre": "m", "kilometer": "km", "kilometre": "km", "in": "inch", "inches": "inch", "ft": "foot", "feet": "foot",
    "yd": "yard", "mi": "mile", "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "kgs": "kg", "hrs": "hour", "mins": "minute", "secs": "second",
    "usd": "dollar", "buck": "dollar", "litre": "liter", "l": "liter", "milliliter": "ml", "millilitre": "ml",
    "deg": "degree", "rad": "radian", "percentage": "percent", "pct": "percent", "mph": "mile per hour", "sq": "square",
    "厘米": "cm", "米": "m", "千米": "km", "公里": "km", "毫米": "mm", "分米": "dm", "平方厘米": "cm^2",
    "平方米": "m^2",
    "立方厘米": "cm^3", "立方米": "m^3", "小时": "hour", "分钟": "minute", "分": "minute", "秒": "second", "天": "day",
    "度": "degree", "千克": "kg", "克": "g", "元": "yuan", "个": "unit", "只": "unit", "人": "unit",
    "种": "unit", "次": "unit",
    "岁": "year", "cu": "cubic", "lbs": "pound", "lb": "pound", "oz": "ounce", "p.m": "pm", "a.m": "am",
}  # fmt: skip
_GENERIC = frozenset(("unit", "unit^2", "unit^3"))
_REFUSED = re.compile(
    r"\b(?:not|no|isn'?t|never|wrong|incorrect|unless|except|without|or|if|undefined|none|mod|modulo|more|less|than|"
    r"correct|answer|ignore|infinity|times|plus|minus|squared|cubed|half|over|dozen|hundred|thousand|million|billion|trillion|"
    r"million|base)\b|不|非|没|无|或|万|亿|千$|百$"
)
MAX_WORDS = 5


def _singular(word: str) -> str:
    name, caret, power = word.partition("^")
    if caret:
        return f"{_singular(name)}^{power}"
    word = _SYNONYMS.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return _SYNONYMS.get(word, word)


def canonical(words: str) -> str | None:
    """One spelling of a unit; None for words that change what the number says ("million", "or", "not")."""
    text = words.lower().strip(" .").replace("{", "").replace("}", "").replace("-", " ")
    if _REFUSED.search(text) or any(ch.isdigit() for ch in re.sub(r"\^\s*[23]\b", "", text)):
        return None
    parts = [_singular(part) for part in re.sub(r"\s*\^\s*", "^", text).replace("/", " per ").split()]
    if len(parts) > MAX_WORDS:
        return None
    joined = " ".join(part for part in parts if part not in ("of", "the", "in", "total") or len(parts) == 1)
    joined = re.sub(r"\bsquare (\S+)", r"\1^2", joined)
    return re.sub(r"\bcubic (\S+)", r"\1^3", joined)


def factor(gold: str | None, predicted: str | None) -> Fraction | None:
    """What the predicted number is multiplied by to stand in gold's unit; None where the units are different things."""
    if gold is None or predicted is None or gold == predicted or gold in _GENERIC or predicted in _GENERIC:
        return Fraction(1)
    (g, power), (p, other) = _powered(gold), _powered(predicted)
    if power != other or g not in _FACTORS or p not in _FACTORS or _FACTORS[g][0] != _FACTORS[p][0]:
        return None
    return (_FACTORS[p][1] / _FACTORS[g][1]) ** power


def _powered(unit: str) -> tuple[str, int]:
    name, _, power = unit.partition("^")
    return name, int(power) if power in ("2", "3") else 1
