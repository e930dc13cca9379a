#!/usr/bin/env python3
"""Write the tables of docs/reference/metrics.md from oreal_megatron/observe/metric_table.py; other text stays."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from oreal_megatron.observe.metric_table import SECTIONS, MetricInfo

PAGE = Path(__file__).parent.parent / "docs/reference/metrics.md"
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def table(rows: tuple[MetricInfo, ...]) -> str:
    """Return the Markdown table of a section."""
    lines = ["| metric | unit | meaning | watch for |", "|---|---|---|---|"]
    for info in rows:
        names = ", ".join(f"`{name}`" for name in info.names)
        lines.append(f"| {names} | {info.unit} | {info.meaning} | {info.watch} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the text of the page with the first table below each section's heading replaced."""
    for title, rows in SECTIONS.items():
        before, heading, after = text.partition(f"## {title}\n")
        if not heading:
            raise ValueError(f"{PAGE} has no section {title!r}; add the heading and an empty table")
        text = before + heading + TABLE.sub(lambda _, rows=rows: table(rows), after, count=1)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    sys.stdout.write(f"{PAGE} written\n")
