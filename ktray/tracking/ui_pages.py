"""MLflow's pages, made to begin at the studies of ktray: run as a program, with the arguments of ``mlflow``.

MLflow 3 opens on pages for language models, and remembers a choice in the browser. The server's index page gets a script that
makes the choice for model training once, and that leads to the trials of a study, best first, whoever comes from elsewhere to
its root, to the list of experiments or to an old link. Everything else is MLflow's own; a version of it that starts in another
way keeps its pages as they are.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ktray.tracking.artifact_locations import open_read_only
from ktray.tracking.mlflow_names import VIEW_QUERY

DATABASE = "KTRAY_UI_DATABASE"  # environment variable: path of the sqlite tracker
_PLAIN_APP, _OWN_APP = "mlflow.server.fastapi_app:app", "ktray.tracking.ui_pages:app"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SCRIPT = """
(() => {
  "use strict";
  const studies = __STUDIES__, view = "__VIEW__";
  try {
    if (localStorage.getItem("ktray.pages") === null) {
      localStorage.setItem("ktray.pages", "1");
      localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
      localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    }
  } catch (error) { /* a browser without storage asks again each time */ }
  const idOf = (hash) => (/^#\\/experiments\\/(\\d+)/.exec(hash) || [])[1];
  const trials = (id) => "#/experiments/" + id + "/runs?" + view;
  const led = (hash, from) => {
    if (/^(#\\/?)?$/.test(hash)) return from === null && studies.length ? trials(studies[0]) : null;
    const bare = /^#\\/experiments\\/(\\d+)(\\/runs|\\/overview\\/usage)?\\/?(\\?workflowType=\\w+)?$/.exec(hash);
    return bare && studies.includes(bare[1]) && idOf(from || "") !== bare[1] ? trials(bare[1]) : null;
  };
  let last = null;
  const follow = () => {
    const target = led(location.hash, last);
    last = target || location.hash;
    if (target) location.replace(target);
  };
  follow();
  for (const name of ["pushState", "replaceState"]) {
    const plain = history[name];
    history[name] = function (...given) {
      plain.apply(history, given);
      setTimeout(follow, 0);
    };
  }
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
})();
"""


def studies_of(database: Path) -> list[str]:
    """Ids of the experiments that are studies of ktray, the latest first; none if the database cannot be read."""
    query = (
        "SELECT e.experiment_id FROM experiments e JOIN experiment_tags t ON t.experiment_id = e.experiment_id "
        "WHERE t.key = 'ktray.study' AND e.lifecycle_stage = 'active' ORDER BY e.last_update_time DESC"
    )
    try:
        with closing(open_read_only(database)) as tables:
            return [str(int(row[0])) for row in tables.execute(query)]
    except (sqlite3.Error, ValueError):
        return []


def with_script(page: str, studies: list[str]) -> str:
    """The index page with the script before MLflow's own; unchanged if it has no head."""
    script = _SCRIPT.replace("__STUDIES__", json.dumps(studies)).replace("__VIEW__", VIEW_QUERY)
    return page.replace("</title>", f"</title><script>{script}</script>", 1)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """MLflow's ASGI application, whose index page has the script."""
    from mlflow.server import fastapi_app

    if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
        await fastapi_app.app(scope, receive, send)
        return
    started: MutableMapping[str, Any] = {}
    parts: list[bytes] = []

    async def collect(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            body = b"".join(parts)
            if started["status"] == 200:
                body = with_script(body.decode(), studies_of(Path(os.environ.get(DATABASE, "")))).encode()
            kept = [header for header in started["headers"] if header[0].lower() not in _OF_THE_PLAIN_PAGE]
            headers = [*kept, (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
            await send({**started, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    plain = [header for header in scope["headers"] if header[0].lower() not in (b"if-none-match", b"if-modified-since")]
    await fastapi_app.app({**scope, "headers": plain}, receive, collect)


_OF_THE_PLAIN_PAGE = (b"content-length", b"etag", b"last-modified", b"cache-control")


def main() -> None:
    """Run ``mlflow`` with this program's arguments, with the application of this module in place of MLflow's own."""
    from mlflow import server
    from mlflow.cli import cli

    build = getattr(server, "_build_uvicorn_command", None)
    if build is not None:

        def build_with_own_app(*given: Any, **named: Any) -> list[str]:
            return [_OWN_APP if word == _PLAIN_APP else word for word in build(*given, **named)]

        server._build_uvicorn_command = build_with_own_app
    cli(sys.argv[1:])


if __name__ == "__main__":
    main()
