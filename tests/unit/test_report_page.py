"""The page of `oreal report --html`: texts of a run stay texts, and values in the charts are those of the logs."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import report_run
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.cli import main
from oreal_megatron.observe import run_report
from oreal_megatron.observe.page import charts, findings, page, rollout_files, run_data, tables

ALLOWED = set(
    "html head meta title link style body header h1 h2 h3 nav a main section div table caption thead tbody tr th td ul "
    "li figure figcaption svg path rect circle text span b p details summary pre script noscript".split()
)


class Elements(HTMLParser):
    """Names and attributes of the elements, and the texts between them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def run(tmp_path, model_folder):
    return report_run.write(tmp_path / "run", model_folder)


@pytest.mark.parametrize("hostile", report_run.HOSTILE)
def test_texts_of_a_run_make_no_element_and_no_attribute(hostile, tmp_path, model_folder):
    hostile = hostile.replace("\ud800", "").replace("\x00", "")  # which no JSON file of a run can hold as UTF-8
    records = []
    for name in ("one", "other"):
        folder = report_run.write(tmp_path / name, model_folder, f"{hostile} {name}", with_dumps=False)
        records.append(run_report.read_run(folder))
    runs = [run_data.read(record, f"{hostile} {number}") for number, record in enumerate(records)]
    text = page.page(runs, [{"name": hostile, "steps": [{"step": 0, "file": hostile, "bytes": 1}]}])
    elements = Elements(text)
    assert {tag for tag, _ in elements.tags} <= ALLOWED
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    counts = Counter(tag for tag, _ in elements.tags)
    assert counts["script"] == 2 and counts["style"] == 1 and counts["link"] == 1
    links = [attributes["href"] for tag, attributes in elements.tags if "href" in attributes]
    assert all(link.startswith("#") or link == "data:," for link in links)
    shown = "".join(elements.texts)
    assert shown.count(hostile.replace("\u2028", "\u2028")) >= 10, "the text itself is shown"


def test_the_page_loads_nothing_and_other_scripts_are_forbidden(run, tmp_path):
    assert main.main(["report", str(run), "--html", str(tmp_path / "out.html")]) == 0
    text = (tmp_path / "out.html").read_text()
    elements = Elements(text)
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and "http-equiv" in a)
    nonce = re.search(r"script-src 'nonce-(\w+)'", policy)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    scripts = [attributes for tag, attributes in elements.tags if tag == "script"]
    assert all(a.get("type") == "application/json" or a["nonce"] == nonce for a in scripts)
    assert not [a for _, a in elements.tags if "src" in a or "style" in a]


def test_step_files_are_one_call_with_json_in_ascii(run, tmp_path, capsys):
    assert main.main(["report", str(run), "--html", str(tmp_path / "out.html"), "--trajectories", "3"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rollouts of 3 steps" in text and "the largest step" in text
    files = sorted((tmp_path / "out_rollouts").iterdir())
    assert [file.name for file in files] == [f"run_0_step_{step:06d}.js" for step in (0, 2, 5)]
    call = re.fullmatch(r"oreal_step\((0,5,.*)\);\n", files[-1].read_bytes().decode("ascii"), re.DOTALL)
    *_, prompts, drawn = json.loads(f"[{call[1]}]")
    assert {prompt["question"].partition(": ")[0] for prompt in prompts} == {f"Question {n}" for n in range(5)}
    assert isinstance(drawn, list)
    rollouts = [rollout for prompt in prompts for rollout in prompt["rollouts"]]
    rows = [json.loads(line) for line in (run / "rollouts/step_000005.jsonl").read_text().splitlines()]
    assert [rollout["response"] for rollout in rollouts] == [row["response"] for row in rows]
    chosen = {(p["slot"], r["index"]): r["chosen"] for p in prompts for r in p["rollouts"] if "chosen" in r}
    assert set(chosen) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert chosen[0, 0]["advantage"] == 1 and len(chosen[0, 0]["tokens"]) == 4
    assert sorted(w for values in chosen.values() for w in values["weight"]) == pytest.approx(
        [n / 100 for n in range(16)]
    )
    assert set(chosen[0, 0]) == {"advantage", "tokens", "weight", "score", "reference"}, "the engine gave no log-probs"


def test_a_second_report_leaves_no_rollouts_of_the_first(run, tmp_path):
    for steps in ("6", "1", "0"):
        assert main.main(["report", str(run), "--html", str(tmp_path / "out.html"), "--trajectories", steps]) == 0
        folder = tmp_path / "out_rollouts"
        assert len(list(folder.iterdir()) if folder.is_dir() else []) == int(steps)


def test_a_folder_of_the_name_is_set_aside_and_not_deleted(run, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "out_rollouts").mkdir()
    (tmp_path / "out_rollouts/thesis.tex").write_text("years of work")
    assert main.main(["report", str(run), "--html", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out_rollouts.1/thesis.tex").read_text() == "years of work"
    assert "out_rollouts existed already; the former one is now" in caplog.text


@pytest.mark.parametrize("missing", ["rollouts", "dumps", "calibration.jsonl", "evaluations.jsonl", "metrics", "model"])
def test_a_run_without_some_of_its_records_has_a_page_too(run, tmp_path, missing, monkeypatch):
    if missing == "metrics":
        (run / "metrics.jsonl").write_text('{"step": 0, "loss/total": 1.0}\n{"step": 1, "loss/total": NaN}\n')
    elif missing == "model":
        config = json.loads((run / "config.json").read_text())
        config["model"]["path"] = str(tmp_path / "gone")
        (run / "config.json").write_text(json.dumps(config))
    elif (run / missing).is_dir():
        (run / missing).rename(tmp_path / "away")
    else:
        (run / missing).unlink()
    assert main.main(["report", str(run), "--html", str(tmp_path / "out.html")]) == 0
    assert "</html>" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda line: line[:40], "line 3 is damaged"),
        (lambda line: "[]", "line 3 holds list, not a rollout"),
        (lambda line: "3", "line 3 holds int, not a rollout"),
        (lambda line: line.replace('"verdict"', '"outcome"'), "line 3 has no verdict"),
    ],
)
def test_a_damaged_rollout_is_named_with_its_file_and_line(run, tmp_path, damage, says, capsys):
    file = run / "rollouts/step_000002.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    assert main.main(["report", str(run), "--html", str(tmp_path / "out.html")]) == 2
    assert f"step_000002.jsonl {says}" in capsys.readouterr().err


def test_charts_show_the_values_of_the_logs(run):
    record = run_report.read_run(run)
    data = run_data.read(record, "run")
    text = page.page([data], [])
    series = [json.loads(a["data-values"]) for t, a in Elements(text).tags if t == "svg" and "data-values" in a]
    drawn = {tuple(map(tuple, line["points"])) for chart in series for line in chart}
    loss = tuple((row["step"], float(f"{row['loss/total']:.5g}")) for row in record.metrics)
    assert loss in drawn
    kl = tuple((s, v) for s, v in data.points("policy/reference_kl") if v == v)
    assert kl in drawn and len(kl) == report_run.STEPS - 1, "nan is left out, not drawn as 0"
    assert all(step.pass_rates == [0, 0, 0, 5, 0, 0, 0, 0, 0, 0] for step in data.counts), "unknown is not incorrect"


def test_what_was_not_recorded_has_no_empty_chart_and_metrics_of_the_user_have_one(run):
    rows = [{"step": step, "loss/total": 1.0, "own/<b>count</b>": step} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = run_data.read(run_report.read_run(run), "run")
    titles = re.findall(r"<figcaption[^>]*>([^<]*)</figcaption>", page.page([data], []))
    assert {"Policy loss", "Held-out accuracy", "own/&lt;b&gt;count&lt;/b&gt;"} <= set(titles)
    assert not {"Gradient norm", "Response length", "Seconds of a step"} & set(titles)


def test_findings_name_what_is_out_of_range_and_nothing_else(run):
    data = run_data.read(run_report.read_run(run), "run")
    text = "\n".join(findings.findings(data))
    assert "30% of the responses are truncated" in text and "6 verdicts of the run are unknown" in text
    assert "mutes" not in text and "AUC" not in text and "mixed" not in text
    quiet = [row | {"verify/unknown": 0, "rollout/truncated_share": 0.0} for row in data.record.metrics]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiet))
    assert not findings.findings(run_data.read(run_report.read_run(run), "run"))
    weights = {"weights/correct_mean": 0.5, "weights/incorrect_mean": 0.01}
    weights |= {"weights/correct_zero_share": 0.2, "weights/incorrect_zero_share": 0.9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | weights) + "\n" for row in quiet))
    (finding,) = findings.findings(run_data.read(run_report.read_run(run), "run"))
    assert "mutes incorrect samples" in finding


numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)


@given(st.lists(st.tuples(st.integers(0, 5000), numbers), max_size=60), st.booleans())
def test_every_series_is_drawn_within_the_chart(points, logarithmic):
    text = charts.draw_lines(charts.Chart("t", [charts.Series("s", sorted(points))], logarithmic=logarithmic))
    paths = re.findall(r'class="line c0 d0" d="(M[^"]*)"', text.split("</svg>")[0])
    for x, y in re.findall(r"([-\d.a-z]+) ([-\d.a-z]+)", "".join(paths).replace("M", " ").replace("L", " ")):
        assert -1 <= float(x) <= charts.WIDTH + 1 and -1 <= float(y) <= charts.HEIGHT + 1
    assert bool(paths) == any(abs(y) < charts.LARGEST for _, y in points)


@given(st.integers(0, 300), st.integers(0, 40))
def test_chosen_steps_are_spread_from_the_first_to_the_last(steps, most):
    chosen = run_data.spread(list(range(steps)), most)
    assert len(chosen) == min(steps, most) and chosen == sorted(set(chosen))
    if chosen:
        assert chosen[-1] == steps - 1 and (chosen[0] == 0 or most == 1)


def test_runs_are_named_by_the_folders_in_which_they_differ(tmp_path):
    paths = [tmp_path / name for name in ("arms/a/seed_0", "arms/b/seed_0")]
    assert run_report.short_names(paths) == ["a/seed_0", "b/seed_0"]
    assert run_report.short_names([tmp_path / "arms/a"]) == ["arms/a"]


def test_only_differing_settings_are_in_the_table_of_differences(run, tmp_path, model_folder):
    other = report_run.write(tmp_path / "other", model_folder)
    config = json.loads((other / "config.json").read_text())
    config["loss"]["kl_coef"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    runs = [run_data.read(run_report.read_run(path), path.name) for path in (run, other)]
    rows = re.findall(r'<th scope="row">([^<]*)</th>', tables.differences(runs))
    assert rows == ["loss.kl_coef", "run"]


def test_a_prompt_has_its_results_in_the_other_steps_that_are_shown(tmp_path):
    def row(question: str, slot: int, index: int, verdict: str) -> str:
        keys = dict.fromkeys(run_data.ROLLOUT_KEYS, "") | {"question": question, "slot": slot, "index": index}
        return json.dumps(keys | {"verdict": verdict, "tokens": 1, "finished": True})

    (tmp_path / "rollouts").mkdir()
    outcomes = {3: ("<b>", "correct", "incorrect"), 7: ("<b>", "unknown", "correct"), 9: ("once", "correct", "correct")}
    for step, (question, *verdicts) in outcomes.items():
        rows = [row(question, step % 4, index, verdict) for index, verdict in enumerate(verdicts)]
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text("\n".join(rows) + "\n")
    histories = rollout_files.prompt_histories(tmp_path, [3, 7, 9])
    assert histories == {"<b>": [(3, 3, 1, 2), (7, 3, 1, 1)]}
    (prompt,) = rollout_files.step_content(tmp_path, 7, None, histories)
    assert list(prompt["history"]) == [(3, 3, 1, 2), (7, 3, 1, 1)]
    (prompt,) = rollout_files.step_content(tmp_path, 9, None, histories)
    assert not prompt["history"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["seed_0/oreal", "seed_0/sft", "seed_1/oreal", "seed_1/sft"], ["oreal", "sft", "oreal", "sft"]),
        (["before/oreal", "after/oreal"], ["before/oreal", "after/oreal"]),  # the folder is all that tells them apart
        (["oreal", "sft"], ["oreal", "sft"]),
    ],
)
def test_seeds_of_an_arm_share_a_colour_and_other_runs_do_not(names, labels):
    assert run_report.curve_labels(names) == labels
