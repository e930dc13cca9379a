"""The table of docs/reference/verifier.md says what the rules do."""

import re
from pathlib import Path

from oreal_megatron.math_equality import rules

DOCS = Path(__file__).parents[3] / "docs/reference/verifier.md"


def test_what_the_page_calls_equal_is_equal():
    section = DOCS.read_text().split("## What counts as equal")[1].split("\n## ")[0]
    wrong, seen = [], 0
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        gold = re.match(r"`([^`]+)`", cells[0]) if len(cells) == 3 else None
        for cell, want in zip(cells[1:], (True, False), strict=True) if gold else ():
            for answer in re.findall(r"`([^`]+)`", cell):
                seen += 1
                if rules.equal(gold.group(1), answer)[0] is not want:
                    wrong.append((gold.group(1), answer, want))
    assert wrong == [] and seen > 120
