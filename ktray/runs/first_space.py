"""From a folder of images to a space file: decode everything, draft, check, measure on a few images, fit to the time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ktray.errors import StageFailed
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import data_loader
from ktray.runs.data_check import describe
from ktray.runs.machine import Machine, this_machine
from ktray.runs.plan import check_space, expected_artifacts
from ktray.runs.recognition import RecognisedData
from ktray.runs.search_forecast import MeasuredStages, SearchForecast, forecast_search, measure
from ktray.runs.settings import Settings
from ktray.runs.space_draft import Draft, draft_for, fitted, render
from ktray.search.space import parse

MINUTE = 60.0
SOURCE = "the drafted space"
_BUSY = 0.7  # share of a core that measuring had


@dataclass(frozen=True)
class FirstSpace:
    """A space for somebody's images.

    Attributes:
        text: the file.
        draft: the choices in it.
        found: what `data_check.describe` says of the images.
        forecast: what its search takes; None if measuring failed, with the reason in `notes`.
        notes: sentences about what was assumed.
    """

    text: str
    draft: Draft
    found: dict[str, Any]
    machine: Machine
    forecast: SearchForecast | None
    notes: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        """Its stable machine-readable form, without the text."""
        return {
            "space": asdict(self.draft),
            "data": self.found,
            "machine": asdict(self.machine),
            "estimate": asdict(self.forecast) if self.forecast else None,
            "notes": list(self.notes),
        }


def first_space(
    data: RecognisedData,
    study: str,
    minutes: float,
    settings: Settings,
    report: Callable[[int, int], None],
    say: Callable[[str], None],
) -> FirstSpace:
    """Look at all images, and draft a space whose search takes about so many minutes on this machine.

    Args:
        report: called with the numbers of images that are decoded and that will be.
        say: called with what is being measured.

    Raises:
        UserError: the data cannot be learned from, or cannot be read.
    """
    found, machine = describe(data.spec, report=report), this_machine()
    draft, notes = draft_for(data.spec, found, machine, study), list(data.passed_over)
    load, identity = data_loader(), data_identity(settings.cache)
    space = parse(render(draft, ""), [], SOURCE)
    notes += [each for each in check_space(space, load, SOURCE) if not _said(each, found)]
    device = "cuda:0" if machine.gpus else "cpu"
    forecast = None
    with tempfile.TemporaryDirectory(dir=settings.cache.parent, prefix=".measure-") as folder:
        try:
            measured = measure(space, identity, Path(folder), device, say)
        except StageFailed as failure:
            notes.append(f"no estimate, because the measurement failed: {failure}")
        else:
            if measured.share < _BUSY:
                notes.append("this machine is busy with other work; the estimate is for one with nothing else to do")

            @lru_cache
            def forecast_of(each: str, trials: int, measured: MeasuredStages = measured) -> SearchForecast:
                space = parse(each, [], SOURCE)
                return forecast_search(space, measured, expected_artifacts(space, trials, identity), identity, load, machine)

            draft = fitted(draft, minutes * MINUTE, lambda each: forecast_of(render(each, ""), each.trials).seconds)
            forecast = forecast_of(render(draft, ""), draft.trials)
            if forecast.seconds > minutes * MINUTE:
                notes.append("even the smallest useful search takes longer than the time asked for")
    return FirstSpace(render(draft, _header(data, found, machine)), draft, found, machine, forecast, tuple(notes))


def _said(note: str, found: dict[str, Any]) -> bool:
    """Whether a note only repeats what the description of the images says, or says it of a few of them."""
    return any(note.endswith(warning) for warning in found["warnings"]) or "sampled image" in note


def _header(data: RecognisedData, found: dict[str, Any], machine: Machine) -> str:
    total = sum(split["images"] for split in found["splits"].values())
    return (
        f"Which pair of teacher and student learns most from these {total:,} images?\n"
        f"Read as {data.spec.kind}{f': {data.because}' if data.because else ''}.\n"
        f"Drafted for {machine}. Change what you like; `ktray plan FILE` checks it.\n"
    )
