"""How texts are encoded for a model: whether they begin with BOS, and what becomes of special tokens in them.

The manifest of the training data says it, each checkpoint carries it, and all that encodes text for the model follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_data.packed import PackedDataset


def check_bos(named: Sequence[tuple[str, PackedDataset]]) -> None:
    """See that the documents of all datasets, each with its flag, begin alike. Raises ValueError."""
    first_flag, first = named[0]
    for flag, dataset in named[1:]:
        if dataset.manifest.bos_id != first.manifest.bos_id:
            raise ValueError(
                f"{flag} {dataset.path}: documents begin {_beginning(dataset)}, those of {first_flag} {first.path} "
                f"{_beginning(first)}: prepare both with --bos, or both without"
            )


def _beginning(dataset: PackedDataset) -> str:
    id = dataset.manifest.bos_id
    return "with their text" if id is None else f"with BOS (id {id})"


def unlike_special_tokens(datasets: Sequence[PackedDataset]) -> str | None:
    """A line about datasets that treat special tokens in their text differently; None if they are alike."""
    kinds = [dataset.manifest.special_tokens for dataset in datasets]
    if len(set(kinds)) < 2:
        return None
    parsed, plain = (datasets[kinds.index(kind)].path for kind in ("parse", "text"))
    return (
        f"{parsed} was prepared with --special_tokens parse, {plain} with text: names of special tokens are single ids "
        "in the one and text in the other"
    )


def encoding_facts(datasets: Sequence[PackedDataset]) -> dict[str, Any]:
    """What a checkpoint says of how its training data was encoded: `bos_id` if documents begin with BOS, and
    `special_tokens` if they were parsed in all datasets ("parse") or in some ("mixed")."""
    facts: dict[str, Any] = {}
    if (bos_id := datasets[0].manifest.bos_id) is not None:
        facts["bos_id"] = bos_id
    kinds = {dataset.manifest.special_tokens for dataset in datasets}
    if kinds != {"text"}:
        facts["special_tokens"] = "parse" if kinds == {"parse"} else "mixed"
    return facts
