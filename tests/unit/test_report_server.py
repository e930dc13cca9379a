"""`oreal report --serve` over real sockets: what it serves, when it builds the page again, and whom it refuses."""

from __future__ import annotations

import http.client
import json
import re
import threading

import pytest
import report_run

from oreal_megatron.cli import main
from oreal_megatron.config import ConfigError
from oreal_megatron.observe.page import server


@pytest.fixture
def served(tmp_path, model_folder):
    """Start a server on an address; yields a function that asks it, and the server."""
    run = report_run.write(tmp_path / "run", model_folder, with_dumps=False)
    page = server.LivePage([run], tmp_path / "out.html", 2)
    started = []

    def start(token: str = "") -> server.PageServer:
        running = server.PageServer("127.0.0.1", 0, page)
        running.token = token
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(running)
        return running

    yield start
    for running in started:
        running.shutdown()
        running.server_close()


def ask(running, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*running.server_address, timeout=60)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    result = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return result


def test_the_page_is_built_again_when_a_log_grows_and_only_then(served, tmp_path):
    running = served()
    status, page, headers = ask(running, "/")
    shown = re.search(r'data-version="([^"]+)" data-poll="(\d+)"', page)
    assert status == 200 and "connect-src 'self'" in page and headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin", "else any site could embed the rollouts"
    assert ask(running, "/version")[1] == shown[1] and int(shown[2]) >= 5
    assert ask(running, "/")[1] == page, "nothing has changed"
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "reward/pass_rate": 0.987654}) + "\n")
    assert ask(running, "/version")[1] != shown[1]
    later = ask(running, "/")[1]
    assert "0.9877" in later and "0.9877" not in page
    assert re.search(r'data-version="([^"]+)"', later)[1] == ask(running, "/version")[1]


def test_a_log_that_cannot_be_read_leaves_the_former_page(served, tmp_path, caplog):
    running = served()
    page = ask(running, "/")[1]
    (tmp_path / "run/config.json").unlink()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write("{}\n")
    assert ask(running, "/")[:2] == (200, page)
    assert "the page stays as it is" in caplog.text and "has no config.json" in caplog.text


def test_only_the_page_and_its_rollouts_are_served(served, tmp_path):
    running = served()
    listing = json.loads(re.search(r'id="listing">(.*?)</script>', ask(running, "/")[1])[1])
    file = listing[0]["steps"][0]["file"]
    status, text, headers = ask(running, f"/{file}")
    assert status == 200 and text.startswith("oreal_step(0,") and headers["Content-Type"].startswith("text/javascript")
    (tmp_path / "secret.js").write_text("secret")
    (tmp_path / "out_rollouts/other.js").write_text("secret")
    for path in ("/out.html", "/secret.js", "/out_rollouts/other.js", "/out_rollouts/../secret.js", "//etc/passwd",
                 "/out_rollouts/run_0_step_000000.js/../../secret.js", "/%2e%2e/secret.js", "/out_rollouts/",
                 "/out_rollouts/run_0_step_999999.js", "/run/config.json"):  # fmt: skip
        status, text, _ = ask(running, path)
        assert status == 404 and "secret" not in text, path


@pytest.mark.parametrize("host", ["example.org", "example.org:8000", "", "127.0.0.1.example.org", "192.168.0.1"])
def test_a_request_under_another_name_is_refused(served, host):
    running = served()
    for path in ("/", "/version", "/out_rollouts/run_0_step_000000.js"):
        status, text, _ = ask(running, path, Host=host)
        assert status == 403 and "open the address" in text


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000"])
def test_names_of_this_machine_are_answered(served, host):
    assert ask(served(), "/version", Host=host)[0] == 200


def test_elsewhere_every_request_needs_the_token(served):
    running = served("right-token")
    assert running.url.endswith("/?token=right-token")
    for path in ("/", "/version", "/?token=", "/?token=wrong", "/version?token=right-toke"):
        assert ask(running, path, Cookie="oreal_report=wrong")[0] == 403
        assert ask(running, path, Cookie='oreal_report="; x=\x7f')[0] == 403
    status, _, headers = ask(running, "/?token=right-token", Host="node7:8000")
    assert status == 200 and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    assert ask(running, "/version", Cookie=headers["Set-Cookie"].split(";")[0])[0] == 200


def test_addresses_of_other_machines_get_a_token():
    assert all(map(server.is_loopback, ("127.0.0.1", "localhost", "::1", "[::1]")))
    assert not any(map(server.is_loopback, ("0.0.0.0", "node7", "10.0.0.1", "", "::", "localhost.example.org")))
    with server.PageServer("0.0.0.0", 0, None) as open_to_all:
        assert len(open_to_all.token) >= 32 and open_to_all.token in open_to_all.url


def test_faults_are_refused_with_a_sentence(tmp_path, model_folder, capsys):
    run = report_run.write(tmp_path / "run", model_folder, with_dumps=False)
    assert main.main(["report", str(run), "--serve"]) == 2
    assert "--serve needs --html FILE" in capsys.readouterr().err
    with (
        server.PageServer("127.0.0.1", 0, None) as first,
        pytest.raises(
            ConfigError, match=r"cannot be served on 127.0.0.1 port \d+: .*choose others with --host and --port"
        ),
    ):
        server.PageServer("127.0.0.1", first.server_address[1], None)


def test_a_port_that_does_not_exist_is_bad_input(tmp_path, model_folder, capsys):
    run = report_run.write(tmp_path / "run", model_folder, with_dumps=False)
    page = str(tmp_path / "r.html")
    assert main.main(["report", str(run), "--html", page, "--serve", "--port", "99999"]) == 2
    assert "on 127.0.0.1 port 99999: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("damage", [b'{"step": 1, "lo', b"\x00\x00\xff", b"5"])
def test_a_damaged_line_of_a_log_is_named(tmp_path, model_folder, capsys, name, damage):
    run = report_run.write(tmp_path / "run", model_folder, with_dumps=False)
    first, *others = (run / name).read_bytes().splitlines()
    (run / name).write_bytes(b"\n".join([first, damage, *others, b""]))
    assert main.main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run / name} {'holds 5; expected' if damage == b'5' else 'line 2 is damaged'}" in said
    assert "remove this line" in said
    (run / name).write_bytes(b"\n".join([first, *others, damage if damage != b"5" else b""]))
    assert main.main(["report", str(run)]) == 0, "a last line that a crash cut short"
