#!/usr/bin/env python3
"""Write docs/reference/config.md, from the declarations of the configuration keys in oreal_megatron/config."""

from __future__ import annotations

import sys
from pathlib import Path

from oreal_megatron.config import Config, reference

PAGE = Path(__file__).parent.parent / "docs/reference/config.md"
HEAD = """\
# Configuration keys

<!-- Written by tools/make_config_reference.py; edit the declarations in oreal_megatron/config instead. -->

A recipe is a Python function that returns a `Config`; `--set KEY=VALUE` changes one key of it for a run.
`oreal config RECIPE` prints this list with the recipe's values. A value outside its bounds is refused with exit
code 2 before anything is loaded, and so is a value that contradicts another key.

"On resume" says what a resumed run does with a value that differs from the one before:

| class | meaning |
|---|---|
| announced | the new value acts from the resumed step on; the change is printed, because results then differ |
| fixed | refused: with another value it would be another run |
| fixed content | the file may move, its content must be the same |
| free | used without a word: results do not depend on it |
"""


def page() -> str:
    """Return the text of the page."""
    return f"{HEAD}\n{reference.markdown(Config())}"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE} written\n")
