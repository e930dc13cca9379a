"""Try inputs that users of this field reported as faults; print one line per case.

    python tools/field_cases.py CASES.jsonl [KIND ...]

CASES.jsonl has one object per line: kind, input, right. With kinds, only cases whose kind contains one of the words are
tried. Kinds that are in the registry and not in the file are tried with an empty input. Exit code 1 if a case fails.
The checks are in field_checks.py and reliability_checks.py; all together take about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT / "tools", ROOT, ROOT / "kernels"))

from case_workshop import CHECKS, Workshop, outcomes  # noqa: E402 - found beside this file

CHECK_MODULES = ("field_checks", "reliability_checks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="CASES.jsonl")
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    args = parser.parse_args()
    for module in CHECK_MODULES:
        importlib.import_module(module)
    cases = [json.loads(line) for line in args.cases.read_text().splitlines()]
    cases += [{"kind": kind, "input": None} for kind in CHECKS if kind not in {case["kind"] for case in cases}]
    chosen = [case for case in cases if not args.kinds or any(word in case["kind"] for word in args.kinds)]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="field_cases_") as folder:
        for kind, fault in outcomes(chosen, Workshop(Path(folder))):
            failed += fault is not None
            print(f"{'FAIL' if fault else 'pass'} {kind}{f': {fault}' if fault else ''}", flush=True)
    print(f"{failed} of {len(chosen)} cases fail" if failed else f"all {len(chosen)} cases pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
