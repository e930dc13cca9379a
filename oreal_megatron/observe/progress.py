"""A progress bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
# Metric of a step -> its text in a progress line.
STEP_TEXTS = {
    "reward/pass_rate": "pass rate {:.3f}",
    "policy/reference_kl": "KL {:.3g}",
    "rollout/response_tokens_mean": "{:.0f} tokens/response",
    "speed/tokens_per_second_per_gpu/step": "{:.0f} tokens/s/GPU",
    "batch/samples": "{:.0f} samples",
}


def step_note(metrics: Mapping[str, float], accuracy: float | None) -> str:
    """Return the end of a step's progress line; `accuracy`: of the last evaluation on held-out problems."""
    texts = [text.format(metrics[name]) for name, text in STEP_TEXTS.items() if name in metrics]
    if accuracy is not None:
        texts.insert(1, f"held-out {accuracy:.1%}")
    return ", ".join(texts)


class Bar:
    """Progress of one long phase, shown on the first rank only. `completed`: items of an earlier start."""

    def __init__(self, title: str, total: int, shown: bool = True, completed: int = 0):
        self.title, self.total, self.done, self.note = title, total, completed, ""
        self.console = Console(quiet=not shown, soft_wrap=True)
        self.started = self.last_line = time.monotonic()
        self.first, self.printed = completed, -1
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        self.bar = Progress(*columns, console=self.console) if shown and self.console.is_terminal else None

    def __enter__(self) -> Bar:
        """Show the bar."""
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *exception: Any) -> None:
        """Remove the bar, or print the last line."""
        if self.bar:
            self.bar.stop()
        elif self.done != self.printed:
            self._print_line()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count finished items; `note` replaces the text at the end of the line."""
        self.done += count
        self.note = self.note if note is None else note
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line, self.printed = time.monotonic(), self.done
        elapsed = self.last_line - self.started
        remaining = elapsed / max(self.done - self.first, 1) * (self.total - self.done)
        times = f"{elapsed:.0f} s, about {remaining:.0f} s left" if self.done < self.total else f"{elapsed:.0f} s"
        self.console.print(f"{self.title} {self.done}/{self.total} ({times}) {self.note}", highlight=False)
