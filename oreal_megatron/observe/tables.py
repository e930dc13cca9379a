"""Tables for the terminal: as wide as the terminal, 80 columns where its width is not known."""

from __future__ import annotations

from rich import box
from rich.table import Table


def simple_table(title: str, caption: str | None = None) -> Table:
    """Return an empty table with one line below its header and no frame."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )


def add_columns(table: Table, left: str, *right: str) -> None:
    """Add a column of text that may be folded, and columns of numbers that are never broken."""
    table.add_column(left, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=" " not in name)
