"""What a notebook shows of a study: its result in a sentence, the leaderboard, and the plots of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.report.figures import history_plot
from ktray.report.formatting import Objective
from ktray.report.headline import headline
from ktray.report.parameter_plots import effects_plot
from ktray.report.tables import leaderboard
from ktray.text import visible

if TYPE_CHECKING:
    from ktray.search.trial import Trial

ROWS = 10  # of the leaderboard


def summary(
    study: str,
    objectives: Sequence[Objective],
    trials: Sequence[Trial],
    references: Mapping[str, Mapping[str, Any]],
    early_stop: Mapping[str, Any] | None,
    test: Mapping[str, Mapping[str, Any]],
) -> str:
    """One element with a style of its own, without scripts; all text is escaped.

    The arguments are those of `render`, and what the test split said.
    """
    style = Markup((Path(__file__).parent / "notebook.css").read_text(encoding="utf-8"))
    first = headline(trials, objectives, references, {}, test)
    parts = [Markup("<style>{}</style><h3>{}</h3><p>{}.</p>").format(style, visible(study), first["counts"])]
    if first["best"]:
        on_test = first["test"]
        judged = f"; on test {on_test['value']}{' ± ' + on_test['error'] if on_test['error'] else ''}" if on_test else ""
        parts.append(
            Markup("<p><b>{}</b> is the best of {} (trial {}): {} {}{}. {}</p>").format(
                visible(first["best"]["name"]),
                first["of"],
                first["best"]["number"],
                first["metric"],
                first["best"]["value"],
                judged,
                visible(" ".join(first["sentences"])),
            )
        )
    table = leaderboard(trials, objectives, references)
    if table:
        head = Markup("").join(Markup("<th>{}</th>").format(visible(name)) for name in ["trial", *table["head"]])
        rows = Markup("").join(_row(row, table["words"]) for row in table["rows"][:ROWS])
        parts.append(Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, rows))
    history = history_plot(trials, objectives, references)
    effects = effects_plot(trials, objectives, early_stop)
    parts += [Markup('<div class="plot">{}</div>').format(history["plot"])] if history else []
    if effects:
        panel = Markup('<div class="effects" style="width: {}px">{}</div>')
        parts.append(panel.format(effects["width"], effects["plot"]))
    return str(Markup('<div class="ktray-study">{}</div>').format(Markup("").join(parts)))


def _row(row: Mapping[str, Any], words: int) -> Markup:
    cells = [row["name"], *(row["words"] or [""] * words), *row["numbers"]]
    return Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(visible(cell)) for cell in cells))
