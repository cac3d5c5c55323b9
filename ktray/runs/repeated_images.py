"""Pictures that a data set holds twice, in one split or across them, and with which labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ktray.images import Splits, split_rows
from ktray.images.duplicates import MOST_COMPARED, find_duplicates
from ktray.images.inspection import InspectedImage, original_of
from ktray.spec import Split
from ktray.text import counted, first_few

_SORTS = {"same_file": "byte for byte", "same_pixels": "in their pixels", "near": "nearly (by a perceptual hash)"}


def repeated_images(inspected: Iterable[InspectedImage], splits: Splits, split: Split) -> dict[str, Any]:
    """The groups of equal and of nearly equal pictures among inspected images that have a signature.

    Args:
        split: how val is held out, so that a copy of a training image in it is found.

    Returns:
        ``compared``: how many images; ``same_file``, ``same_pixels``, ``near``: groups, each a list of ``[split, name]``;
        ``across_splits``, ``other_labels``: how many of these groups are in several splits, or have several labels.
    """
    found = [each for each in inspected if each.signature is not None]
    sources = {name: part for name in ("train", "val", "test") if (part := getattr(splits, name)) is not None}
    held_out = split_rows(splits, split).get("val")
    held_out_rows = set(held_out[1].tolist()) if held_out and splits.val is None else set()
    same = find_duplicates(
        [each.signature for each in found if each.signature is not None],
        lambda index: original_of(sources[found[index].split], found[index].row),
    )

    def split_of(index: int) -> str:
        each = found[index]
        return "val" if each.split == "train" and each.row in held_out_rows else each.split

    def label_of(index: int) -> str | None:
        part = sources[found[index].split]
        return None if part.labels is None else part.classes[part.labels[found[index].row]]

    groups = [*same.same_file, *same.same_pixels, *same.near]
    return {
        "compared": len(found),
        **{
            sort: [[[split_of(index), found[index].name] for index in group] for group in getattr(same, sort)]
            for sort in _SORTS
        },
        "across_splits": sum(len({split_of(index) for index in group}) > 1 for group in groups),
        "other_labels": sum(len({label_of(index) for index in group}) > 1 for group in groups),
    }


def warnings_about(repeated: dict[str, Any]) -> list[str]:
    """Sentences about repeated pictures."""
    found = []
    for sort, how in _SORTS.items():
        groups: Sequence[Sequence[Sequence[str]]] = repeated[sort]
        if groups:
            further = sum(map(len, groups)) - len(groups)
            example = first_few((name for _, name in groups[0]), 3)
            found.append(f"{counted(further, 'image')} repeat{'s' * (further == 1)} another one {how}, such as {example}")
    across, labels = repeated["across_splits"], repeated["other_labels"]
    if across:
        leak = next(group for sort in _SORTS for group in repeated[sort] if len({split for split, _ in group}) > 1)
        where = first_few((f"{name} ({split})" for split, name in leak), 3)
        found.append(
            f"{counted(across, 'picture')} {'is' if across == 1 else 'are'} in several splits, so that judges see what was "
            f"learned from: {where}"
        )
    if labels:
        found.append(f"{counted(labels, 'repeated picture')} {'has' if labels == 1 else 'have'} several labels")
    if repeated["compared"] >= MOST_COMPARED:
        found.append(f"only the first {MOST_COMPARED:,} images were compared with each other")
    return found
