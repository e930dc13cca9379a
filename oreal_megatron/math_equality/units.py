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
_PREFIXES = {"G": ("giga", "1e9"), "M": ("mega", "1e6"), "k": ("kilo", "1e3"), "": ("", "1"), "m": ("milli", "1e-3")}
_PHYSICAL = {"N": "newton", "J": "joule", "V": "volt", "W": "watt", "Hz": "hertz", "Pa": "pascal", "A": "ampere",
             "C": "coulomb", "mol": "mol", "eV": "electronvolt", "ohm": "ohm"}  # fmt: skip
# symbols whose capitals matter, with the names they stand for: kPa, MHz, mA
SYMBOLS = {p + s: word + name for s, name in _PHYSICAL.items() for p, (word, _) in _PREFIXES.items()} | {
    "K": "kelvin", "T": "tesla", "F": "farad", "kWh": "kilowatthour", "hPa": "hectopascal", "m": "m", "g": "g",
    "s": "second", "h": "hour", "L": "liter", "cm": "cm", "mm": "mm", "km": "km", "kg": "kg", "mg": "mg", "mL": "ml",
    "rpm": "rpm", "dB": "decibel",
}  # fmt: skip
# those that need no \text behind a number: 2MA and 2mV are products
PLAIN_SYMBOLS = frozenset(s for s in SYMBOLS if len(s) > 1 and not s.isupper() and (s[0] != "m" or s in ("mol", "mL")))
_TABLES: tuple[tuple[str, dict[str, str]], ...] = (
    ("length", _LENGTH),
    ("time", _TIME),
    ("mass", _MASS),
    ("money", _MONEY),
    ("volume", _VOLUME),
    *((name, {word + name: factor for word, factor in _PREFIXES.values()}) for name in _PHYSICAL.values()),
)
_FACTORS = {name: (dimension, Fraction(factor)) for dimension, table in _TABLES for name, factor in table.items()}
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
    "amp": "ampere", "mole": "mol", "cal": "calorie", "kcal": "kilocalorie", "atm": "atmosphere", "ha": "hectare",
    "岁": "year", "cu": "cubic", "lbs": "pound", "lb": "pound", "oz": "ounce", "p.m": "pm", "a.m": "am",
}  # fmt: skip
_KNOWN = frozenset(_FACTORS) | frozenset(_SYNONYMS.values()) | frozenset(
    "unit percent degree radian euro yen rupee yuan pound ounce ton tonne gallon quart pint cup acre hectare year "
    "month calorie kelvin tesla farad kilowatthour hectopascal decibel rpm celsius fahrenheit bar "
    "psi lux lumen candela person people men women children child sheep fish mice geese feet way point "
    "minute am pm".split()
)  # fmt: skip
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
                "dozen": 12, "万": 10**4, "亿": 10**8}  # fmt: skip
_BESIDE = frozenset("of the in total square cubic per a an us each old".split())  # no unit by themselves
_ARITHMETIC = re.compile(
    r"not?|isn|never|wrong|incorrect|unless|except|without|or|and|if|undefined|none|correct|answer|ignore|infinit\w*|"
    r"\w+th|(?!months$|paths$|lengths$|baths$|moths$|cloths$|births$|deaths$)\w+ths|hal[fv]\w*|thirds?|quarters?|"
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|zero)e?s?|\w+teen|\w+ty|"
    r"\w*(?:illion|illiard)(?:s|es)?|\w*illones|mil(?:le|s)?|hundreds?|thousands?|dozens?|scores?|gross|lakhs?|crores?|"
    r"myriads?|pairs?|couples?|double[ds]?|triple[ds]?|times|fold|squared|squares|cube[ds]?|powers?|exponents?|roots?|sqrt|logs?|"
    r"factorials?|inverses?|reciprocals?|negatives?|positives?|opposites?|complements?|minus|plus|over|above|below|under|"
    r"less|more|fewer|than|least|most|up|down|to|through|thru|until|between|by|from|exclusive|inclusive|minimums?|"
    r"maximums?|mod\w*|base|basis|bps|pis?|pies|sets?|groups?|multiples?|rad|radians?|permille|imaginary|others?|ago|later?|approx\w*"
)
_COUNTED = frozenset("个只人种次岁名位条张件块支枝把台辆朵棵头匹间座层颗粒瓶杯箱袋页题道步项场年月日角吨升")
_CJK_ARITHMETIC = re.compile("[不非没无或万亿千百十的以倍折打成多余几约半幂前后负]|方(?![法式案])")
MAX_WORDS = 5


def _singular(word: str) -> str:
    """Return the name of a unit without its plural; a power (cm^2) stays."""
    name, caret, power = word.partition("^")
    if caret:
        return f"{_singular(name)}^{power}"
    word = _SYNONYMS.get(word, word)
    if _is_plural(word):
        word = word[:-1]
    return _SYNONYMS.get(word, word)


def _part(word: str) -> str:
    """Return the name of one word of a unit: a symbol as it is written, other words without capitals and plural."""
    symbol, caret, power = word.partition("^")
    return SYMBOLS[symbol] + caret + power if symbol in SYMBOLS else _singular(word.lower())


def _is_plural(word: str) -> bool:
    return len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))


def scaled(words: str) -> tuple[int, str]:
    """Split a multiplier off the words behind a number: "million dollars" -> (10**6, "dollars")."""
    first, _, others = words.strip().partition(" ")
    if first.lower() in _MULTIPLIERS:
        return _MULTIPLIERS[first.lower()], others
    return (_MULTIPLIERS[first[0]], words.strip()[1:]) if first[:1] in _MULTIPLIERS else (1, words)


def canonical(words: str) -> str | None:
    """Return one spelling of a unit or of the things counted; None for words that may change the number.

    Accepted are known units, and plurals without a word of arithmetic ("halves", "to the third", "factorial").
    """
    text = words.strip(" .").replace("{", "").replace("}", "").replace("\\cdot", " ")
    if not text.isascii():
        return _cjk(text.lower())
    text = re.sub(r"\s*\^\s*", "^", re.sub(r"(?<=\w)-(?=\w)", " ", text)).replace("/", " per ")
    parts = [_part(part) for part in text.split()]
    text = text.lower()
    if len(parts) > MAX_WORDS or not all(re.fullmatch(r"[a-z.']+(?:\^[23])?", part) for part in text.split()):
        return None
    if any(_ARITHMETIC.fullmatch(part) for part in text.split()) or "percent" in parts[:-1] or text == "per cent":
        return None
    nouns = [part for part in parts if part not in _BESIDE]
    plural = any(_is_plural(part) for part in text.split())
    if nouns and not plural and not any(part.partition("^")[0] in _KNOWN for part in nouns):
        return None
    joined = " ".join(part for part in parts if part not in ("of", "the", "in", "total") or len(parts) == 1)
    joined = re.sub(r"\bdegree (celsius|fahrenheit)\b", r"\1", joined)
    joined = re.sub(r"\bsquare (\S+)", r"\1^2", "unit" if joined in ("total", "each") else joined)
    return re.sub(r"\bcubic (\S+)", r"\1^3", joined)


def denies(words: str) -> bool:
    """Return whether words in front of "=" may negate or change the value behind it."""
    return any(_ARITHMETIC.fullmatch(word) for word in words.lower().split()) or bool(_CJK_ARITHMETIC.search(words))


def _cjk(text: str) -> str | None:
    """Return the unit in Chinese words: 5个, 5米, 5种方法; None for 5倍 and 5次方."""
    if text in _SYNONYMS:
        return _SYNONYMS[text]
    return "unit" if text[0] in _COUNTED and len(text) <= 6 and not _CJK_ARITHMETIC.search(text) else None


def letter(name: str, power: int) -> str | None:
    """Return the unit that a single letter behind a number stands for, or None."""
    unit = "liter" if name == "l" else SYMBOLS.get(name) if len(name) == 1 else None
    return unit if unit is None or power == 1 else f"{unit}^{power}"


def factor(gold: str | None, predicted: str | None) -> Fraction | None:
    """Return the factor from the predicted unit to gold's; None where the units measure different things."""
    if gold is None or predicted is None or gold == predicted:
        return Fraction(1)
    (g, power), (p, other) = _powered(gold), _powered(predicted)
    if power != other:
        return None
    if "unit" in (g, p):
        return Fraction(1) if {g, p}.isdisjoint(("percent", "degree", "dollar", "cent")) else None
    if g in _FACTORS or p in _FACTORS:
        alike = g in _FACTORS and p in _FACTORS and _FACTORS[g][0] == _FACTORS[p][0]
        return (_FACTORS[p][1] / _FACTORS[g][1]) ** power if alike else None
    known = any(word in _KNOWN for word in f"{gold} {predicted}".split())
    less, more = sorted((set(gold.split()), set(predicted.split())), key=len)
    return Fraction(1) if not known and less <= more else None  # right triangles are triangles


def _powered(unit: str) -> tuple[str, int]:
    name, _, power = unit.partition("^")
    return name, int(power) if power in ("2", "3") else 1
