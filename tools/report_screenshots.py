#!/usr/bin/env python3
"""Take the pictures of docs/how_to/report.md from a page of `oreal report --html`, with headless Chromium.

python tools/report_screenshots.py PAGE.html FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import Browser

TRAINED_ON = """
[...document.querySelectorAll('.controls label')].filter((label) => /side by side|trained on/.test(label.textContent))
  .forEach((label) => label.querySelector('input').click());
document.querySelectorAll('.list button')[2].click();
"""


def main(page: Path, folder: Path) -> None:
    """Write report_charts.png, report_rollouts.png and report_phone.png."""
    with Browser() as browser:
        for name, width, height in (("charts", 1280, 980), ("phone", 400, 900)):
            browser.open(page, width)
            browser.screenshot(folder / f"report_{name}.png", {"x": 0, "y": 0, "width": width, "height": height})
        browser.open(page, 1280)
        browser.wait_for("document.querySelectorAll('.list button').length > 2")
        browser.evaluate(TRAINED_ON)
        top = browser.evaluate("document.getElementById('trajectories').getBoundingClientRect().top + scrollY")
        browser.screenshot(folder / "report_rollouts.png", {"x": 0, "y": top, "width": 1280, "height": 620})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
