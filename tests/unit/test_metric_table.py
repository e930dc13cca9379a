"""Every metric has one row in one table; the reference page, the charts and the code agree with it."""

from __future__ import annotations

import re

import pytest
from repository import ROOT, load_tool

from oreal_megatron.observe import metric_table
from oreal_megatron.observe.page import panels

PARTS = ("loss", "reward", "rollout", "batch", "policy", "weights", "reward_model", "parity", "verify", "weight_sync",
         "penalty", "distillation", "seconds", "speed")  # fmt: skip
# Formatted names: what stands for the expression in braces.
EXAMPLES = {
    "name": "policy",
    "phase": "policy",
    "part": "training",
    "kind": "repetition",
    "side": "correct",
    "figure": "mean",
}
NO_METRICS = {"speed/{kind}/{name}", "weight_sync/{name}_bytes"}  # made of names that stand elsewhere in full


def names_in_code() -> set[str]:
    """Names of metrics in the package, as literals or formatted."""
    pattern = re.compile(rf'"((?:{"|".join(PARTS)})/[a-z_0-9{{}}/]+)"')
    files = [path for path in (ROOT / "oreal_megatron").rglob("*.py") if path.name != "metric_table.py"]
    return {name for path in files for name in pattern.findall(path.read_text())} - NO_METRICS


def test_every_metric_in_the_code_is_explained():
    names = {re.sub(r"\{(\w+)\}", lambda m: EXAMPLES[m[1]], name) for name in names_in_code()}
    assert len(names) > 40
    missing = sorted(name for name in names if metric_table.find(name) is None)
    assert not missing, f"add rows to oreal_megatron/observe/metric_table.py: {missing}"


def test_no_metric_has_two_rows():
    names = [name for info in metric_table.METRICS for name in info.names]
    assert len(names) == len(set(names))
    for name in names:
        plain = re.sub("|".join(metric_table.PLACEHOLDERS), "policy", name)
        rows = [
            info for info in metric_table.METRICS if any(metric_table._pattern(n).fullmatch(plain) for n in info.names)
        ]
        assert len(rows) == 1, (name, rows)


def test_the_reference_page_is_what_the_table_says():
    tool = load_tool("make_metrics_reference")
    text = tool.PAGE.read_text()
    assert tool.page(text) == text, "run python tools/make_metrics_reference.py"


@pytest.mark.parametrize(
    "panel", [*panels.LEARNING, *panels.ROLLOUTS, *panels.REWARD_MODEL, *panels.STABILITY, *panels.SPEED], ids=str
)
def test_every_chart_is_of_metrics_with_a_meaning(panel):
    for metric, _ in panel.metrics:
        meaning = metric_table.plain_meaning(metric)
        assert meaning and "`" not in meaning and "](" not in meaning


def test_names_that_nobody_explains_are_not_explained():
    assert metric_table.find("loss/unheard_of") is None and metric_table.plain_meaning("x") == ""
    assert metric_table.find("own/anything at all") is metric_table.OWN[0]
    assert metric_table.find("reward_model/gradient_norm") is metric_table.find("policy/gradient_norm")
