"""Summary of a graded file: outcomes, methods, times and, where lines have labels, accuracy by kind."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict

from rich import box
from rich.console import Console
from rich.table import Table

from oreal_megatron.records import Outcome
from oreal_megatron.verify import VERSION
from oreal_megatron.verify.grade_file import FileLine, read_label

MAX_KINDS = 12  # with more kinds, only those with an error are listed
EXCLUDED = "convention"  # kinds that begin so are graded and left out of the accuracy: people differ on them


class FileSummary:
    """Counts and times of the lines that were added."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.unreadable = 0  # lines that cannot be graded
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, line: FileLine) -> None:
        """Count one line; `label` (1 = the answer is equivalent) and `kind` are optional fields."""
        outcome = line.verdict.outcome
        self.outcomes[outcome.value] += 1
        self.methods[line.verdict.method] += 1
        if line.error:
            self.unreadable += 1
            return
        self.seconds.append(line.verdict.seconds)
        label = read_label(line.fields)
        if label is None:
            return
        kind = self.kinds[str(line.fields.get("kind", "all"))]
        kind["pairs"] += 1
        kind["agreeing"] += outcome is (Outcome.CORRECT if label else Outcome.INCORRECT)
        kind["false accepts"] += outcome is Outcome.CORRECT and not label
        kind["false rejects"] += outcome is not Outcome.CORRECT and label

    def print(self, console: Console) -> None:
        """Print the summary, wrapped to the console's width."""
        for line in self.sentences():
            console.print(line, highlight=False, markup=False)
        if self.kinds:
            self._print_kinds(console)

    def sentences(self) -> list[str]:
        """Return the lines of the summary above the table of kinds."""
        total = sum(self.outcomes.values())
        counts = ", ".join(f"{self.outcomes[outcome.value]} {outcome.value}" for outcome in Outcome)
        unknown = self.outcomes[Outcome.UNKNOWN.value] / max(total, 1)
        methods = ", ".join(f"{name} {count}" for name, count in self.methods.most_common())
        lines = [
            f"{total} answers: {counts} (unknown {unknown:.2%})",
            f"verifier version {VERSION}; methods: {methods}",
        ]
        if self.seconds:
            ordered = sorted(self.seconds)
            median, p99 = statistics.median(ordered), ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
            lines.append(f"per answer: median {median * 1e3:.3f} ms, p99 {p99 * 1e3:.2f} ms, worst {ordered[-1]:.3f} s")
        counted = [kind for name, kind in self.kinds.items() if not name.startswith(EXCLUDED)]
        if (together := sum(counted, Counter()))["pairs"]:
            cells = zip(("pairs", "accuracy", "false accepts", "false rejects"), _accuracy_cells(together), strict=True)
            lines.append(f"kinds other than {EXCLUDED}: " + ", ".join(f"{name} {cell}" for name, cell in cells))
        return lines

    def _print_kinds(self, console: Console) -> None:
        """Print every kind where there are few, else the kinds with an error."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("kind", overflow="fold")
        for name in ("pairs", "accuracy", "false accepts", "false rejects"):
            table.add_column(name, justify="right")
        for name in sorted(self.kinds):
            kind = self.kinds[name]
            if kind["agreeing"] < kind["pairs"] or len(self.kinds) <= MAX_KINDS:
                table.add_row(name, *_accuracy_cells(kind))
        if table.row_count:
            console.print(table)
        if hidden := len(self.kinds) - table.row_count:
            console.print(f"{hidden} kinds without an error are not listed", highlight=False)


def _accuracy_cells(kind: Counter[str]) -> list[str]:
    """Return pairs, accuracy, false accepts and false rejects."""
    accuracy = f"{kind['agreeing'] / kind['pairs']:.2%}"
    return [str(kind["pairs"]), accuracy, str(kind["false accepts"]), str(kind["false rejects"])]
