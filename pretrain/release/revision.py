"""Writes one revision of a release: the exported model, and the run folder cut at its checkpoint.

Everything written is a function of the run's files up to the checkpoint, without dates or temporary names: a revision
rewritten after a kill has the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_data.record.content import RecordContent, scan_record
from lit_data.record.order_file import OrderFacts
from lit_data.record.parts import list_parts
from lit_data.record.rewind import merge_steps
from lit_data.tokenizers.files import copy_tokenizer
from lit_eval.model.model_tokenizer import facts_of
from lit_eval.run_facts import read_run
from lit_eval.score.results import Results
from lit_files.checkpoint_name import budget_name, checkpoint_step
from lit_files.publish import link_or_copy, write_json, write_text
from lit_files.reading import read_dataclass, read_object
from lit_files.run_files import DATAPOINTS, ENVIRONMENT, EVALUATIONS, LAYERS, METRICS, ORDER, SETTINGS
from lit_model.checksum import weights_checksum
from lit_model.hf.io import open_tensors
from lit_model.load import WITHOUT_TENSORS, Checkpoint
from pretrain.convert.export import export_to_hf
from pretrain.evaluation_plan import cut_evaluations
from pretrain.logs.metrics import cut_metrics
from pretrain.release.card import card_additions
from pretrain.release.manifest import (
    FORMAT,
    MANIFEST,
    RUN,
    Link,
    Manifest,
    Previous,
    Weights,
    describe_file,
    digest,
    files_in,
    settings_digest,
    sha256_of,
)
from pretrain.resume import changes_of


@dataclass(frozen=True)
class Planned:
    """A checkpoint to publish, under its names."""

    checkpoint: Path
    step: int
    name: str
    aliases: list[str]
    meta: dict[str, Any]
    training_state: bool


@dataclass(frozen=True)
class Card:
    """Facts for the card that are not in the run: repository, licence, results by step."""

    repo: str | None
    licence: str | None
    results: Sequence[Results] = ()


def names_of(meta: dict[str, Any]) -> list[str]:
    """A revision's names, the last one first: chck_1M for the word budgets a checkpoint reached, else step1000."""
    budgets = sorted(meta.get("word_budgets") or [], reverse=True)
    return [f"chck_{budget_name(words)}" for words in budgets] or [f"step{meta['step']}"]


def write_revision(
    run: Path, planned: Planned, before: Link | None, folder: Path, card: Card, *, earlier: Path | None = None
) -> Link:
    """Write a revision to an existing, empty folder.

    Args:
        before: the revision before it; None for the first.
        earlier: folder with files of the record written for earlier revisions, if there is one.

    Raises ValueError if the record does not cover the steps up to the checkpoint, or is not that of `before`.
    """
    cut = folder / RUN
    bounds = [0, *(part.end_step for part in (before.manifest.record if before else [])), planned.step]
    cut_run(run, planned, bounds, cut, earlier)
    known = {part.end_step: part for part in (before.manifest.record if before else [])}
    record = []
    for first, end in pairwise(bounds):
        if end in known and earlier is not None and same_files(cut / DATAPOINTS, earlier, first, end):
            record.append(known[end])
            continue
        content = scan_record(cut, first, end).content
        if end in known and known[end] != content:
            raise ValueError(
                f"{run} is not the run that was published before {planned.name}: its record of steps {first} to "
                f"{end - 1} differs"
            )
        record.append(content)
    previous = before.previous if before else None
    results = [some for some in card.results if some.model.step == planned.step]
    additions = card_additions(read_run(cut), results, planned.name, card.repo, card.licence, previous)
    export_to_hf(planned.checkpoint, folder / "export", card=additions)
    for path in (folder / "export").iterdir():
        os.rename(path, folder / path.name)
    (folder / "export").rmdir()
    manifest = manifest_of(folder, planned, record, previous)
    text = manifest.to_bytes()
    (folder / MANIFEST).write_bytes(text)
    return Link(manifest, sha256_of(text))


def manifest_of(folder: Path, planned: Planned, record: list[RecordContent], previous: Previous | None) -> Manifest:
    """The manifest of a revision whose files are complete."""
    meta, tensors = planned.meta, open_tensors(folder)
    return Manifest(
        format=FORMAT,
        revision=planned.name,
        aliases=planned.aliases,
        step=planned.step,
        tokens=meta.get("tokens"),
        words=meta.get("words"),
        training_state=planned.training_state,
        weights=Weights(len(tensors), weights_checksum(tensors.items())),
        settings=settings_digest(meta["config"]),
        changes=changes_of(meta, planned.checkpoint),
        model=digest(meta["model_config"]),
        data=meta["data"]["train"],
        tokenizer=facts_of(meta).get("fingerprint"),
        record=record,
        previous=previous,
        files={path: describe_file(folder / path) for path in files_in(folder)},
    )


def same_files(one: Path, other: Path, first_step: int, end_step: int) -> bool:
    """Whether the files of some steps are the same files (hard links) in two folders of a record."""
    names = steps_files(one, first_step, end_step)
    return bool(names) and all((other / n).exists() and os.path.samefile(one / n, other / n) for n in names)


def steps_files(folder: Path, first_step: int, end_step: int) -> list[str]:
    """The merged files of a record folder within some steps, by name."""
    return [
        part.path.name
        for part in list_parts(folder)
        if part.rank is None and first_step <= part.first_step and part.end_step <= end_step
    ]


def cut_run(run: Path, planned: Planned, bounds: Sequence[int], cut: Path, earlier: Path | None) -> None:
    """Write to `cut` the run folder as it was at a checkpoint, with one merged file of the record between bounds."""
    datapoints = cut / DATAPOINTS
    datapoints.mkdir(parents=True)
    for first, end in pairwise(bounds):
        names = steps_files(earlier, first, end) if earlier is not None else []
        for name in names:
            assert earlier is not None
            link_or_copy(earlier / name, datapoints / name)
        if not names:
            merge_steps(run, first, end, datapoints)
    write_json(datapoints / ORDER, cut_order(run, planned))
    if planned.training_state:
        copy_checkpoint(planned.checkpoint, cut / planned.checkpoint.name)
    else:
        write_facts(planned.meta, cut / planned.checkpoint.name)
    settings = planned.meta["config"] | {"resume": None}
    write_text(cut / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    for name in (METRICS, LAYERS, EVALUATIONS):
        if (run / name).is_file():
            shutil.copyfile(run / name, cut / name)
    for name in (METRICS, LAYERS):
        cut_metrics(cut / name, planned.step)
    cut_evaluations(cut / EVALUATIONS, planned.step, again=False)
    if (run / ENVIRONMENT).is_file():
        lines = (run / ENVIRONMENT).read_bytes().splitlines(keepends=True)
        (cut / ENVIRONMENT).write_bytes(b"".join(line for line in lines if began_before(line, planned.step)))
    if (run / "tokenizer").is_dir():
        copy_tokenizer(run / "tokenizer", cut / "tokenizer")


def cut_order(run: Path, planned: Planned) -> dict[str, Any]:
    """order.json as it was at a checkpoint: a later rollback, phase or number of ranks is not in it."""
    path = run / DATAPOINTS / ORDER
    read_dataclass(OrderFacts, path)  # raises for damage
    order, meta = read_object(path), planned.meta
    order |= {"segments": meta["segments"], "skips": meta.get("skips") or [], "phases": meta["data"]["phases"]}
    order["layouts"] = [layout for layout in order["layouts"] if layout[0] < planned.step]
    return order


def began_before(line: bytes, step: int) -> bool:
    """Whether a whole line of environment.jsonl is of a start before `step`."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("step"), int) and found["step"] < step


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint file or folder by hard links where possible: a checkpoint is never changed in place."""
    assert checkpoint_step(source) is not None
    if source.is_dir():
        target.mkdir()
        for path in sorted(source.iterdir()):
            link_or_copy(path, target / path.name)
    else:
        link_or_copy(source, target)


def write_facts(meta: dict[str, Any], path: Path) -> None:
    """Write a checkpoint file with the facts of training, without weights and optimizer state."""
    facts = {key: value for key, value in meta.items() if key != "checksums"} | {WITHOUT_TENSORS: True}
    torch.save({"model": {}, "optimizer": {}, "meta": json.dumps(facts)}, path)


def read_planned(path: Path, training_state: bool) -> Planned:
    """Read a checkpoint's meta. Raises ValueError for one that training did not write."""
    meta = Checkpoint(path).meta
    step = checkpoint_step(path)
    for key in ("segments", "config", "data", "model_config"):
        if key not in meta:
            raise ValueError(
                f"{path} was not written by a training run (its meta has no {key}); it cannot be published"
            )
    if meta.get("step") != step:
        raise ValueError(f"{path} is named after step {step}, but it was saved at step {meta.get('step')}")
    if meta.get(WITHOUT_TENSORS):
        raise ValueError(f"{path} was published without its tensors; publish from the run that trained it")
    name, *aliases = names_of(meta)
    return Planned(path, meta["step"], name, aliases, meta, training_state)
