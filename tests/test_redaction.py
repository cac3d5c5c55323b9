"""No password and no token is ever in a text that ktray prints, logs or stores."""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from ktray import cli, redaction
from ktray.output import log_to_stderr, print_err
from ktray.tracking import Tracker, mlflow_names
from ktray.tracking.connection import validated_uri
from tests.trackers import free_port, session, spool_of, wait_for

SECRET = "Zq7!kX0w"
URIS = [
    "https://someone:{}@mlflow.lab:5000/path",
    "http://{}@mlflow.lab",  # a token alone
    "https://mlflow.lab/?token={}",
    "https://mlflow.lab/x?a=1&api_key={}&b=2",
    "https://mlflow.lab/#access_token={}",
    "postgresql+psycopg2://someone:{}@db.lab/mlflow",
    "mysql://someone:{}@db.lab:3306/mlflow?ssl=true",
    "ftp://someone:{}@host",
    "databricks://someone:{}@host",
    "someone:{}@mlflow.lab:5000",  # without a scheme
    "someone:{}@mlflow.lab",
    "https://some@one:{}@mlflow.lab",
    "https://someone:{}%40@mlflow.lab",
    "https://someone:{}@at/slash@mlflow.lab",
    "https://someone:{}@mlflow.lab:99999",
    "https://someone:{}@[::1",
    "https://some one:{}@mlflow.lab",
    "HTTPS://SOMEONE:{}@MLFLOW.LAB",
]


@pytest.fixture(autouse=True)
def no_other_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("uri", URIS)
def test_a_secret_of_the_tracker_is_in_no_text_that_names_it(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    redaction.remember(uri.format(SECRET))
    for text in (
        f"cannot write to {uri.format(SECRET)} (ConnectionError)",
        f"could not translate host name {SECRET!r}",
        f"{uri.format(SECRET)}, {uri.format(SECRET)!r}; <{uri.format(SECRET)}>",
        f"resume with: ktray search space.yaml --tracking='{uri.format(SECRET)}'",
    ):
        print_err(text)
        shown = capfd.readouterr().err
        assert SECRET not in shown
        assert redaction.MASK in shown
        assert SECRET not in redaction.without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        f"https:/someone:{SECRET}@host/x.yaml",
        f"https:/{SECRET}@host/x.yaml",
        f"/home/me/https:/someone:a/{SECRET}@host/x.yaml",
        f"https:/host/x.yaml?token={SECRET}",
        f"myown+scheme:/someone:{SECRET}@host/x.yaml?token={SECRET}",
    ],
)
def test_a_url_that_has_become_a_path_hides_its_secret_too(text: str) -> None:
    shown = redaction.without_secrets(text)
    assert SECRET not in shown
    assert "host/x.yaml" in shown


@pytest.mark.parametrize("uri", URIS)
def test_a_url_hides_its_secret_even_where_it_was_never_given_to_ktray(uri: str) -> None:
    if "://" in uri and " " not in uri:
        assert SECRET not in redaction.without_secrets(f"Failed to parse: {uri.format(SECRET)}")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MLFLOW_TRACKING_PASSWORD", SECRET),
        ("MLFLOW_TRACKING_TOKEN", SECRET),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("DATABASE_URL", f"postgresql://someone:{SECRET}@db"),
        ("HTTPS_PROXY", f"http://someone:{SECRET}@proxy:3128"),
        ("http_proxy", f"http://{SECRET}@proxy:3128"),
    ],
)
def test_secrets_of_the_environment_are_hidden_wherever_they_appear(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    for text in (f"ProxyError({SECRET})", f"Failed to parse: {value}", f"dsn={value}"):
        assert SECRET not in redaction.without_secrets(text)


@pytest.mark.parametrize("variable", ["PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "SECRET_STORE", "KRB5_CREDENTIALS"])
def test_a_place_on_this_machine_is_no_secret(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    assert redaction.without_secrets(f"there is no folder {tmp_path}/nope") == f"there is no folder {tmp_path}/nope"


@pytest.mark.parametrize("variable", ["PWD", "OLDPWD"])
def test_the_working_directory_is_no_secret_even_where_it_is_gone(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "/gone/folder")
    assert redaction.without_secrets("/gone/folder/nope") == "/gone/folder/nope"


@pytest.mark.parametrize(
    "text",
    [
        f"Max retries exceeded with url: /?token={SECRET}/api/2.0/mlflow/experiments/get-by-name?experiment_name=toy (Caused",
        f"{{'Authorization': 'Basic {SECRET}'}}",
        f"Authorization: Bearer {SECRET}",
        f"connection to server failed: password={SECRET} user=me",
        f"MLFLOW_TRACKING_PASSWORD={SECRET} ktray search",
    ],
)
def test_texts_of_mlflow_and_its_clients_lose_what_looks_like_a_secret(text: str) -> None:
    assert SECRET not in redaction.without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "space.yaml: pair.student.backbone.readout: 'tokn' is none of mean, token",
        "parquet:cats.parquet?label=label",
        "sqlite:////home/me@work/.ktray/mlflow.db",
        "file:///data/cat@2x.png?",
        "trial 4 failed: acc@1 is NaN",
        "http://127.0.0.1:5000/#/experiments/1/runs/abc",
        "a bearer of news: the secret of 5 = 2 + 3",
        "https://github.com/lab/ktray",
        "folder:/photos/me@work?size=64",
        "imagefolder:/a.b/c:d?size=64&val=0.1, coco:/coco?train=train&test=test",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    redaction.remember("sqlite:////home/me@work/.ktray/mlflow.db")
    redaction.remember("./runs@home")
    assert redaction.without_secrets(text) == text


def test_the_log_hides_secrets_in_records_of_any_library_and_in_tracebacks(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers.clear()
    try:
        log_to_stderr(logging.WARNING)
        try:
            raise ConnectionError(f"https://me:{SECRET}@host refused")
        except ConnectionError:
            logging.getLogger("urllib3").exception("retrying https://me:%s@host", SECRET)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert SECRET not in shown


@pytest.mark.parametrize(
    "uri", [uri for uri in URIS if not uri.lower().startswith("http")] + ["https://a:{}@h:99999", "https://a:{}@[::1"]
)
def test_a_tracker_that_cannot_be_is_refused_without_its_password(
    uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["ui", "--home", str(tmp_path), "--tracking", uri.format(SECRET)])
    out, err = capfd.readouterr()
    assert code == 2
    assert SECRET not in out + err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["ui", "status", "best", "show"])
def test_no_verb_prints_the_password_of_the_tracker(verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"http://someone:{SECRET}@127.0.0.1:{free_port()}"
    arguments = ["toy"] if verb in ("best", "show") else []
    cli.main([verb, *arguments, "--home", str(tmp_path), "--tracking", uri, *([] if verb == "ui" else ["--json"])])
    assert SECRET not in "".join(capfd.readouterr())


def test_a_wrong_argument_beside_the_tracker_does_not_show_its_password(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--trackin", f"http://me:{SECRET}@h", "--bogus", f"http://me:{SECRET}@h"]) == 2
    assert SECRET not in "".join(capfd.readouterr())


def _refusing_server(answer: bytes) -> int:
    """Port of a server that answers every request alike."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            client, _ = listener.accept()
            client.recv(65536)
            client.sendall(answer)
            client.close()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize("where", ["down", "forbidden", "proxy"])
def test_a_tracker_that_fails_leaves_its_password_neither_in_the_log_nor_in_any_file(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    if where == "forbidden":
        body = json.dumps({"error_code": "PERMISSION_DENIED", "message": f"no rights for password={SECRET}"}).encode()
        port = _refusing_server(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    if where == "proxy":
        monkeypatch.setenv("HTTP_PROXY", f"http://someone:{SECRET}@127.0.0.1:{port}")
    host = "tracker.invalid" if where == "proxy" else f"127.0.0.1:{port}"
    tracker: Tracker = session(tmp_path, "toy", f"http://someone:{SECRET}@{host}/?token={SECRET}")
    tracker.begin_trial(0, "pair", {}, {})
    wait_for(lambda: "cannot write to the tracker" in caplog.text)
    assert not tracker.close("FINISHED", timeout=20)
    assert tracker.unwritten().waiting >= 3
    assert SECRET not in caplog.text
    files: list[Any] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert spool_of(tmp_path, "toy") / "events.jsonl" in files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_uri_itself_keeps_its_password_for_mlflow() -> None:
    uri = f"https://someone:{SECRET}@mlflow.lab"
    assert validated_uri(uri) == uri


def test_the_address_of_a_page_of_mlflow_is_printed_as_it_is_opened() -> None:
    page = f"http://127.0.0.1:5000/#/experiments/12/runs?{mlflow_names.VIEW_QUERY}"
    assert redaction.without_secrets(page) == page
    assert redaction.without_secrets(f"{page}&token={SECRET}") == f"{page}&token=***"
