"""MLflow's web pages are served to this machine only, and the server ends with the command."""

from __future__ import annotations

import signal
import socket
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from ktray import cli
from ktray.errors import UserError
from ktray.tracking import StageRun, default_uri, ui_pages, ui_server
from tests.chromium import browser
from tests.trackers import (
    answers,
    free_port,
    python,
    runs_of,
    session,
    wait_for,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one home for all tests of this file, as creating a database takes seconds. Its name needs quoting in URIs."""
    return tmp_path_factory.mktemp("a home%41")


@pytest.fixture(autouse=True)
def _no_tracker_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_pages_of_mlflow_are_served_to_this_machine_and_leave_no_process_behind(
    home: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    uri, port = default_uri(home), free_port()
    image = tmp_path / "sheet.png"
    image.write_bytes(b"sheet")
    tracker = session(home, "pages")
    tracker.log_stage(StageRun("key", "stage", images=[image]))
    assert tracker.close("FINISHED", timeout=60)
    code = "import sys\nfrom ktray.tracking import ui_server\nsys.exit(ui_server.serve(sys.argv[1], int(sys.argv[2])))"
    process = python(code, uri, str(port))
    pages = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{pages}/health"))
    children = descendants(process.pid)
    assert 1 <= len(children) <= 3, children
    with pytest.raises(UserError, match="taken"):
        ui_server.serve(uri, port)
    assert answers(pages)
    run = runs_of(uri, "pages")["stage"].info.run_id
    with urllib.request.urlopen(f"{pages}/get-artifact?path=images/sheet.png&run_uuid={run}") as reply:
        assert reply.read() == b"sheet"
    foreign_host = urllib.request.Request(
        f"{pages}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": "evil.com"}
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign_host)
    same_origin = urllib.request.Request(
        f"{pages}/ajax-api/2.0/mlflow/runs/search",
        data=b'{"experiment_ids": ["0"]}',
        headers={"Content-Type": "application/json", "Origin": pages},
    )
    with urllib.request.urlopen(same_origin) as reply:
        assert reply.status == 200
    process.send_signal(ending)
    assert process.wait(timeout=20) == 0
    process.communicate()
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_pages_without_a_database_are_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no runs in"):
        ui_server.serve(default_uri(tmp_path), free_port())
    assert ui_server.serve("https://me:secret@mlflow.lab", 1) == 0
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "port", ["99999", "65536", "0", "-1", "-99999", "http", "5000.0", "5e3", "", " ", "1" * 5000, "²", "0x1388"]
)
def test_what_is_no_port_is_refused_in_one_line(port: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", "--home", str(tmp_path), f"--port={port}"]) == 2
    err = capfd.readouterr().err
    assert "no port: a whole number from 1 to 65535" in err
    assert len(err.splitlines()) == 1


def test_a_port_that_is_in_use_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--home", str(tmp_path), "--port", str(port)]) == 2
    assert capfd.readouterr().err == f"ktray: ktray ui: port {port} is taken. Choose another with --port.\n"


def test_the_index_page_gets_its_script_before_the_programs_of_mlflow_and_only_studies_are_led_to_their_trials(
    tmp_path: Path,
) -> None:
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as tables, tables:
        tables.execute("CREATE TABLE experiments (experiment_id INTEGER, lifecycle_stage TEXT, last_update_time INTEGER)")
        tables.execute("CREATE TABLE experiment_tags (experiment_id INTEGER, key TEXT, value TEXT)")
        rows = [(1, "active", 5), (2, "active", 9), (3, "deleted", 10), (4, "active", 11)]
        tables.executemany("INSERT INTO experiments VALUES (?, ?, ?)", rows)
        tables.executemany("INSERT INTO experiment_tags VALUES (?, 'ktray.study', 'x')", [(1,), (2,), (3,)])
    assert ui_pages.studies_of(database) == ["2", "1"]
    assert ui_pages.studies_of(tmp_path / "none.db") == []
    page = "<html><head><title>MLflow</title><script src=a.js></script></head></html>"
    found = ui_pages.with_script(page, ["2", "1"])
    assert found.index('const studies = ["2", "1"]') < found.index("a.js")
    assert ui_pages.with_script("no page", ["1"]) == "no page"


@pytest.mark.parametrize("hosts", ["a b", "http://a.org", "a.org/x", "a.org;b.org"])
def test_what_is_no_host_is_refused_in_one_line(hosts: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", "--home", str(tmp_path), "--allowed-hosts", hosts]) == 2
    assert "is no name of a host" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.browser
def test_every_way_in_leads_to_the_trials_best_first_and_a_proxy_is_let_through(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    tracker = session(home, "pages")
    tracker.describe_study([("knn/top1", "max")], ["cost/seconds"], ["teacher", "transfer.k"], "[All](view)")
    for number in range(3):
        tracker.begin_trial(number, "hog", {"teacher": "hog", "transfer.k": number}, {"ktray.state": "running"})
        tracker.end_trial(number, "FINISHED", {"ktray.state": "completed"}, {"objective/knn/top1": number / 10})
    assert tracker.close("FINISHED", timeout=60)
    uri, port = default_uri(home), free_port()
    call = "ui_server.serve(sys.argv[1], int(sys.argv[2]), ['mlflow.example.org'])"
    code = f"import sys\nfrom ktray.tracking import ui_server\n{call}"
    process, pages = python(code, uri, str(port)), f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{pages}/health"))
        proxied = urllib.request.Request(
            f"{pages}/ajax-api/2.0/mlflow/runs/search",
            data=b'{"experiment_ids": ["1"]}',
            headers={"Host": "mlflow.example.org", "Origin": "https://mlflow.example.org", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(proxied) as reply:
            assert reply.status == 200
        with browser() as page:

            def sees(words: str) -> bool:
                return words in page.value("document.body.innerText")

            for way in ("/", "/#/", "/#/experiments/1", "/#/experiments/1/runs"):
                page.open("about:blank")
                page.open(f"{pages}{way}")
                wait_for(lambda: sees("0002 hog"))
                text = page.value("document.body.innerText")
                assert "Trials, best first" in text
                assert text.index("0002 hog") < text.index("0001 hog") < text.index("0000 hog")
            page.open("about:blank")
            page.open(f"{pages}/#/experiments/1/runs?viewStateShareKey=ktray&compareRunsMode=CHART")
            wait_for(lambda: sees("The study"))
            assert sees("Parallel")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        process.communicate()
