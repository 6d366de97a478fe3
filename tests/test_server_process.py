"""`Server` around a process that is no SGLang: its log, its port, and when an edited policy counts as in force."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dspark_sgl import demo
from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.policies.reader import parse_policy
from dspark_sgl.server import Server, ServerError

POLICY = "version: 1\nname: edited\nschedule: {{kind: fixed, depth: {depth}}}\n"
LISTENING = "import sys, http.server as h; h.test(h.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """It answers whatever it is asked, as files of a folder are answered."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "health_generate").touch()
    server = Server([])
    server._command = [sys.executable, "-c", LISTENING, str(server.port)]
    return server


def test_the_log_goes_with_a_server_that_ended_well(listening: Server) -> None:
    with listening:
        assert listening.log_file.exists()
    assert not listening.log_file.exists()


def test_the_log_of_an_error_stays_and_is_named(listening: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), listening:
        1 / 0  # noqa: B018
    assert "health_generate" in listening.log_file.read_text()
    assert str(listening.log_file) in capsys.readouterr().err


def test_a_start_that_failed_names_its_log_and_one_that_was_stopped_leaves_none(
    listening: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: Server) -> None:
        raise KeyboardInterrupt

    listening._command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with pytest.raises(ServerError, match=rf"(?s)ended with 3.*no such model.*{listening.log_file}"), listening:
        pass
    assert "no such model" in listening.log
    with monkeypatch.context() as patch:
        patch.setattr(Server, "_wait_until_ready", stopped)
        other = Server([])
        with pytest.raises(KeyboardInterrupt), other:
            pass
    assert not other.log_file.exists()


def test_a_server_that_never_started_leaves_nothing(listening: Server, tmp_path: Path) -> None:
    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir())) + len(list(tmp_path.iterdir()))

    before = held()
    for _ in range(5):
        Server([])
    assert held() == before


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        monkeypatch.setattr(sys, "argv", ["demo", "--serve", "--port", str(taken.server_port)])
        assert demo.main() == 1
    error = capsys.readouterr().err
    assert f"port {taken.server_port} cannot be used" in error and error.count("\n") == 1


class Reporting(ThreadingHTTPServer):
    """Answers `/server_info` as a server of ours that has this policy in force, after so many reloads."""

    in_force = parse_policy(POLICY.format(depth=1).encode(), "first")
    accepted = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server: Reporting = self.server  # type: ignore[assignment]
            state = {"digest": server.in_force.digest, "reloads": {"accepted": server.accepted, "refused": 0}}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"internal_states": [{"dspark": state}]}).encode())

        def log_message(self, *_: object) -> None:
            pass


@pytest.fixture
def reporting() -> Iterator[Reporting]:
    with Reporting(("127.0.0.1", 0), Reporting.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("written", [1, 2, 3])
def test_an_edit_waits_for_this_very_text(reporting: Reporting, tmp_path: Path, written: int) -> None:
    """Also where the file holds it already, and not for the reload of another."""
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.format(depth=written))
    done = threading.Event()

    def reload() -> None:
        for depth in (3, 2):
            time.sleep(0.3)
            reporting.in_force = parse_policy(POLICY.format(depth=depth).encode(), "later")
            reporting.accepted += 1
        done.set()

    threading.Thread(target=reload).start()
    Server([], port=reporting.server_port).edit_policy(file, POLICY.format(depth=2))
    assert done.wait(1) and file.read_text() == POLICY.format(depth=2)
    assert reporting.in_force.schedule.depth == 2


def test_an_edit_that_no_server_would_take_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="depht"):
        Server([]).edit_policy(tmp_path / "p.yaml", "version: 1\nname: x\nschedule: {kind: fixed, depht: 3}\n")
