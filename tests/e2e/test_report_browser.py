"""The page of `oreal report --html` in a real browser: draws, filters, searches, colours; no text of a run runs."""

from __future__ import annotations

import contextlib
import json
import threading

import browser
import pytest
import report_run

from oreal_megatron.cli import main
from oreal_megatron.observe.page import server

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not browser.binary(), reason="needs Chromium or Chrome on the path, or OREAL_CHROMIUM"),
]


@pytest.fixture(scope="module")
def tab():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def page(tmp_path, model_folder):
    runs = [report_run.write(tmp_path / name, model_folder) for name in ("one", "two")]
    assert main.main(["report", *map(str, runs), "--html", str(tmp_path / "out.html")]) == 0
    return tmp_path / "out.html"


def listed(tab) -> list[str]:
    return tab.evaluate("[...document.querySelectorAll('.list button')].map((b) => b.textContent)")


def choose(tab, label: str, value: str) -> None:
    """Set a control by the text of its label, as a person would."""
    tab.evaluate(
        f"""(() => {{
        const labels = [...document.querySelectorAll('.controls label')];
        const control = labels.find((l) => l.textContent.startsWith({label!r})).querySelector('input, select');
        if (control.type === 'checkbox') return control.click();
        control.value = {value!r};
        for (const name of ['input', 'change']) control.dispatchEvent(new Event(name));
        }})()"""
    )


def count(tab, selector: str) -> int:
    return tab.evaluate(f"document.querySelectorAll({selector!r}).length")


def text(tab, selector: str) -> str:
    return tab.evaluate(f"document.querySelector({selector!r})?.textContent")


def ready(tab) -> None:
    tab.wait_for("document.querySelectorAll('.list button').length > 0")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (1280, True)])
def test_the_page_draws_without_errors_requests_or_a_scroll_bar_across(tab, page, width, dark):
    tab.messages.clear(), tab.requests.clear()
    tab.open(page, width, dark=dark)
    ready(tab)
    assert not tab.messages, tab.messages
    assert all(url.startswith(("file:", "data:")) for url in tab.requests)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    drawn = tab.evaluate(
        "[...document.querySelectorAll('figure > svg')].filter((s) => s.getBoundingClientRect().width > 200).length"
    )
    assert drawn >= 12
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert light == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")


def test_no_text_of_a_run_runs_and_all_of_it_is_shown(tab, page):
    tab.messages.clear()
    tab.open(page)
    ready(tab)
    shown = []
    for number in range(report_run.PROMPTS * report_run.PER_PROMPT):
        tab.evaluate(f"document.querySelectorAll('.list button')[{number}].click()")
        shown.append(text(tab, ".detail"))
    everything = "".join(shown)
    assert all(hostile.partition("\x00")[0][:12] in everything for hostile in report_run.HOSTILE)
    assert tab.evaluate("window.attacked") is None and not tab.messages
    assert count(tab, "#viewer script, #viewer img, #viewer iframe, #viewer base") == 0
    assert tab.evaluate("getComputedStyle(document.body).display") == "block"


def test_filters_and_search_leave_what_matches(tab, page):
    tab.open(page)
    ready(tab)
    everything = report_run.PROMPTS * report_run.PER_PROMPT
    assert len(listed(tab)) == everything
    choose(tab, "outcome", "correct")
    assert len(listed(tab)) == 5 and all(row.startswith("correct") for row in listed(tab))
    choose(tab, "outcome", "")
    choose(tab, "method", "judge")
    assert len(listed(tab)) == 5
    choose(tab, "method", "")
    choose(tab, "tokens from", "30")
    assert len(listed(tab)) == 10
    choose(tab, "tokens from", "")
    choose(tab, "truncated", "")
    assert len(listed(tab)) == 5 and all("truncated" in row for row in listed(tab))
    choose(tab, "truncated", "")
    choose(tab, "trained on", "")
    assert len(listed(tab)) == 4
    choose(tab, "trained on", "")
    choose(tab, "search", "NEEDLE31")
    assert len(listed(tab)) == 1 and "1 of 20" in text(tab, "[role=status]")
    assert text(tab, ".response mark") == "needle31"
    choose(tab, "search", "no such text")
    assert listed(tab) == [] and "no rollout matches" in text(tab, ".detail")


def test_tokens_are_coloured_and_both_outcomes_stand_side_by_side(tab, page):
    tab.open(page)
    ready(tab)
    choose(tab, "trained on", "")
    colours = "[...document.querySelectorAll('.response span')].map((s) => s.style.backgroundColor).filter(Boolean)"
    by_weight = tab.evaluate(colours)
    assert len(by_weight) == 4 and len(set(by_weight)) == 4
    choose(tab, "colour tokens by", "score")
    assert tab.evaluate(colours) != by_weight
    choose(tab, "colour tokens by", "logp")
    assert tab.evaluate(colours) == [] and "not recorded" in tab.evaluate(
        "document.querySelector('.detail').textContent"
    )
    choose(tab, "correct and incorrect", "")
    outcomes = tab.evaluate("[...document.querySelectorAll('.sides .outcome')].map((s) => s.textContent)")
    assert outcomes == ["correct", "incorrect"]


def test_mathematics_is_drawn_and_its_text_is_a_click_away(tab, page):
    tab.messages.clear()
    tab.open(page)
    ready(tab)
    tab.evaluate(f"document.querySelectorAll('.list button')[{report_run.PER_PROMPT * 3}].click()")
    assert count(tab, ".question math msup") == 1 and count(tab, ".response math menclose mfrac") == 1
    namespaces = "[...new Set([...document.querySelectorAll('.response math *')].map((e) => e.namespaceURI))]"
    assert tab.evaluate(namespaces) == ["http://www.w3.org/1998/Math/MathML"]
    over = "[...document.querySelector('mfrac').children].map((part) => part.getBoundingClientRect().top)"
    above, below = tab.evaluate(over)
    assert above < below, "a fraction is drawn as one"
    choose(tab, "mathematics", "")
    assert (
        count(tab, "math") == 0 and r"\boxed{\frac{0}7}" in text(tab, ".response") and "$x^3$" in text(tab, ".question")
    )
    choose(tab, "mathematics", "")
    choose(tab, "search", r"boxed{\frac{0}")
    assert count(tab, ".response mark.formula math") == 1 and not tab.messages
    choose(tab, "search", "")
    choose(tab, "trained on", "")
    assert count(tab, ".response math") == 0 < count(tab, ".response span"), "colours are those of the tokens"


def test_steps_and_runs_load_when_they_are_chosen(tab, page):
    tab.requests.clear()
    tab.open(page)
    ready(tab)
    assert [url.rpartition("/")[2] for url in tab.requests if url.endswith(".js")] == ["run_0_step_000005.js"]
    tab.evaluate("document.querySelector('[aria-label=\"previous step\"]').click()")
    tab.wait_for("document.querySelector('.controls').textContent.includes('step 4 ')")
    choose(tab, "run", "1")
    tab.wait_for("document.querySelector('.controls').textContent.includes('step 5 ')")
    names = [url.rpartition("/")[2] for url in tab.requests if url.endswith(".js")]
    assert names == ["run_0_step_000005.js", "run_0_step_000004.js", "run_1_step_000005.js"]


def test_a_missing_step_is_told_on_the_page(tab, page):
    for file in page.with_name("out_rollouts").iterdir():
        file.unlink()
    tab.open(page)
    tab.wait_for("document.querySelector('[role=status]').textContent.includes('is missing')")


def test_keys_move_through_the_list(tab, page):
    tab.open(page)
    ready(tab)
    tab.evaluate("document.querySelector('.list button').focus()")
    for kind in ("keyDown", "keyUp"):
        tab.command("Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown")
    rows = tab.evaluate("[...document.querySelectorAll('.list button')].map((b) => b.getAttribute('aria-current'))")
    assert rows.index("true") == 1 and tab.evaluate("document.activeElement.getAttribute('aria-current')") == "true"


def test_the_value_under_the_pointer_stands_in_the_legend(tab, page):
    tab.open(page)
    ready(tab)
    place = tab.evaluate(
        "(() => { const svg = document.querySelector('#learning figure:nth-child(2) > svg'); "
        "const box = svg.getBoundingClientRect(); return [box.left + box.width * 0.13, box.top + 50]; })()"
    )
    tab.command("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    shown = tab.evaluate("document.querySelector('#learning figure:nth-child(2) .value').textContent")
    assert shown == "0 at 0"


def test_texts_have_enough_contrast(tab, page):
    """WCAG AA: 4.5 to 1 for text, in both schemes."""
    for dark in (False, True):
        tab.open(page, dark=dark)
        ready(tab)
        ratios = tab.evaluate(
            """(() => {
            const channel = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            const shares = [0.2126, 0.7152, 0.0722];
            const light = (c) => shares.reduce((sum, w, n) => sum + w * channel(Number(c.match(/\\d+/g)[n])), 0);
            const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            const paint = getComputedStyle(document.querySelector('figure')).backgroundColor;
            return ['.note', 'thead th', '.correct', '.incorrect', '.unknown', 'nav a', '.trail', '.controls label']
              .map((name) => [name, ratio(light(getComputedStyle(document.querySelector(name)).color), light(paint))]);
            })()"""
        )
        assert all(ratio >= 4.5 for _, ratio in ratios), ratios


def test_one_prompt_over_the_steps(tab, page):
    tab.messages.clear()
    tab.open(page)
    ready(tab)
    tab.evaluate(f"document.querySelectorAll('.list button')[{report_run.PER_PROMPT * 2}].click()")
    question, chips = text(tab, ".detail .question"), "[aria-label='this prompt over the steps'] button"
    assert count(tab, chips) == report_run.STEPS and text(tab, f"{chips}[aria-current='true']") == "step 5: 1 of 3"
    tab.evaluate(f"document.querySelectorAll({chips!r})[1].click()")
    tab.wait_for(f"document.querySelector({chips + '[aria-current=true]'!r})?.textContent === 'step 1: 1 of 3'")
    assert text(tab, ".detail .question") == question and "step 1 (2 of 6" in text(tab, ".controls")
    assert not tab.messages


def test_a_served_page_is_loaded_again_when_the_logs_grow_unless_rollouts_are_read(
    tab, tmp_path, model_folder, monkeypatch
):
    monkeypatch.setattr(server, "SHORTEST_POLL_S", 1.0)
    monkeypatch.setattr(server, "BUILD_SHARE", 10.0)
    run = report_run.write(tmp_path / "run", model_folder, with_dumps=False)
    tab.messages.clear(), tab.requests.clear()
    with server.PageServer("127.0.0.1", 0, server.LivePage([run], tmp_path / "out.html", 2)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        tab.open(running.url)
        ready(tab)
        tab.evaluate("window.marked = true, document.querySelector('.list button').focus()")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 6, "reward/pass_rate": 0.987654}) + "\n")
        before = len([url for url in tab.requests if url.endswith("/version")])
        tab.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")
        assert len([url for url in tab.requests if url.endswith("/version")]) > before, "it looks for news"
        assert tab.evaluate("window.marked") is True, "the reader is at the rollouts"
        tab.evaluate("document.activeElement.blur()")
        reloaded = False
        while not reloaded:  # pytest's limit of time ends it
            with contextlib.suppress(RuntimeError):  # of an expression that the reload ended
                reloaded = tab.evaluate("window.marked === undefined && document.body.textContent.includes('0.9877')")
        ready(tab)
        assert not tab.messages and all(url.startswith((running.url, "data:")) for url in tab.requests)
        running.shutdown()
