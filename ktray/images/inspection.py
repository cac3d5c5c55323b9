"""Decodes all images of a data set and their masks, or a sample, and says of each what it is or why it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ktray.images.decoding import Properties, pixels_and_properties
from ktray.images.duplicates import MOST_COMPARED, Signature, signature
from ktray.images.source import Source, Unreadable


@dataclass(frozen=True)
class InspectedImage:
    """What was found of one image.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        row: of its source.
        name: of the image.
        properties: None if it is unreadable or if the data set holds no encoded images.
        why: why it is unreadable; empty if it is not.
        signature: to compare it with others; None unless asked for.
    """

    split: str
    row: int
    name: str
    properties: Properties | None
    why: str = ""
    signature: Signature | None = None


def inspect(
    splits: Mapping[str, Source],
    spec: Any,
    threads: int,
    sample: int | None = None,
    compare: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[InspectedImage]:
    """Each image, or `sample` of them spread over all splits, in order.

    Args:
        spec: of the data set, whose limits decide what is unreadable.
        threads: how many images are decoded at a time.
        compare: give the first `MOST_COMPARED` images a signature.
        report: called now and then with the number of images so far and of all.
    """
    places = [(name, row) for name, part in splits.items() for row in range(len(part.names))]
    if sample is not None and places:
        places = [places[at] for at in np.unique(np.linspace(0, len(places) - 1, sample).astype(np.int64)).tolist()]

    def look(numbered: tuple[int, tuple[str, int]]) -> InspectedImage:
        number, (split, row) = numbered
        return _inspected(split, splits[split], row, spec, compare and number < MOST_COMPARED)

    done, numbered = 0, enumerate(places)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        while some := list(islice(numbered, 64 * max(1, threads))):  # `map` would start all at once, and keep all results
            for found in pool.map(look, some):
                done += 1
                yield found
            report(done, len(places))


def original_of(part: Source, row: int) -> bytes | Path | None:
    """The file or the encoded bytes of an image; None for a data set whose images are not encoded."""
    read: Callable[[int], bytes | Path] | None = part.original or part.encoded
    return None if read is None else read(row)


def _inspected(split: str, part: Source, row: int, spec: Any, compare: bool) -> InspectedImage:
    name = part.names[row]
    try:
        encoded = original_of(part, row)
        if encoded is None:
            return InspectedImage(split, row, name, None, "", signature(part.read(row)) if compare else None)
        pixels, found = pixels_and_properties(encoded, spec)
        if part.mask is not None:
            part.mask(row)
    except Unreadable as error:
        return InspectedImage(split, row, name, None, str(error))
    return InspectedImage(split, row, name, found, "", signature(pixels) if compare else None)
