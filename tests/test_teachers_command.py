"""`ktray teachers`: what is on disk, what a download would bring before it is made, and whether a teacher is what it was."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from ktray.checksums import read_json, write_json
from ktray.cli import main
from tests.hub_cache import COMMIT, config_of, in_cache, in_folder, random_weights

timm = pytest.importorskip("timm")
torch.set_num_threads(1)

NAME = "efficientvit_m0.r224_in1k"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache and home; no network but this machine's own."""
    from huggingface_hub import constants

    connect = socket.socket.connect

    def own(self: Any, address: Any) -> Any:
        assert address[0] == "127.0.0.1", f"the network was touched: {address}"
        return connect(self, address)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", own)
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[list[str]]:
    """A server that speaks as much of the hub's protocol as a download takes; the requests that it answered."""
    from huggingface_hub import constants

    model = random_weights(NAME)
    folder = in_folder(model, tmp_path / "repository", config_of(model), "mit")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            body, headers = b"{}", {}
            if path == f"/api/models/timm/{NAME}":
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                info = {"id": f"timm/{NAME}", "sha": COMMIT, "siblings": siblings, "tags": ["license:mit"], "gated": False}
                body = json.dumps({**info, "private": False, "downloads": 0}).encode()
            elif path.startswith(f"/timm/{NAME}/resolve/main/"):
                body = files[path.rpartition("/")[2]]
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    yield asked
    server.shutdown()
    server.server_close()


def test_fetch_says_size_and_licence_first_and_asks_before_it_downloads(hub: list[str], cache: Path, capsys: Any) -> None:
    assert main(["teachers", "fetch", NAME]) == 2
    err = capsys.readouterr().err
    megabytes = sum(file.stat().st_size for file in (cache.parent / "repository").iterdir()) / 1e6
    assert f"{megabytes:,.1f} MB; licence: mit" in err
    assert "nothing was fetched" in err
    assert "--yes" in err
    assert not any("/resolve/" in each for each in hub)
    assert main(["teachers", "fetch", NAME, "--yes"]) == 0
    said = capsys.readouterr()
    assert said.err.index("licence: mit") >= 0
    assert f"ktray teachers check {NAME}" in said.out
    assert main(["teachers", "list", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    parameters = sum(each.numel() for each in random_weights(NAME).state_dict().values())
    assert (row["name"], row["parameters"], row["licence"], row["input"]["size"]) == (NAME, parameters, "mit", 224)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("efficientvit_m1.r224_in1k", "the hub has no repository timm/efficientvit_m1.r224_in1k"),
        ("efficientvit_m9.r224_in1k", "timm has no model 'efficientvit_m9'"),
        ("timm/efficientvit_m0.r224_in1k", "write timm: efficientvit_m0.r224_in1k"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(name: str, said: str, hub: list[str], capsys: Any) -> None:
    assert main(["teachers", "fetch", name, "--yes"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_hub_that_does_not_answer_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["teachers", "fetch", NAME, "--yes"]) == 2
    err = capsys.readouterr().err
    assert "could not be fetched" in err
    assert err.count("\n") == 1


def test_list_says_what_is_on_disk_and_what_is_wrong_with_the_rest(cache: Path, capsys: Any) -> None:
    assert main(["teachers", "list"]) == 0
    assert "0 teachers" in capsys.readouterr().out
    in_cache(random_weights(NAME), NAME, cache, licence="bsd-3-clause")
    odd = in_cache(random_weights(NAME), "resnet18.a1_in1k", cache)
    assert main(["teachers", "list"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith(NAME))
    assert "224 px, bicubic, crop 0.875" in row
    assert "mit" in row, "the config's own licence comes before the card's"
    assert f"is about '{NAME}'" in out, odd
    assert "1 teacher in" in out


def test_check_keeps_a_fingerprint_and_notices_other_features(cache: Path, tmp_path: Path, capsys: Any) -> None:
    in_cache(random_weights(NAME), NAME, cache)
    for expected in ("kept for later checks", "as in an earlier check"):
        assert main(["teachers", "check", NAME]) == 0
        out = capsys.readouterr().out
        assert expected in out
        assert "mean [0.485, 0.456, 0.406]" in out
        assert "licence: mit" in out
    [file] = (tmp_path / "home" / "teachers").iterdir()
    kept = read_json(file)
    assert len(kept["fingerprint"]) == 16
    assert len(set(kept["fingerprint"])) > 8, "the images differ"
    write_json(file, {**kept, "fingerprint": [kept["fingerprint"][0] + 0.01, *kept["fingerprint"][1:]], "timm": "1.0.0"})
    assert main(["teachers", "check", NAME]) == 2
    err = capsys.readouterr().err
    assert "are not those of an earlier check" in err
    assert "timm 1.0.0" in err
    assert main(["teachers", "check", "efficientvit_m0"]) == 2
    assert "does not say which weights" in capsys.readouterr().err
