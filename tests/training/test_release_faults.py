"""Faults planted in sound releases, with and without manifests forged to fit, are all found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from family_runs import train_family
from running import script

from lit_data.record.content import RecordContent, scan_record
from lit_files.checkpoint_name import checkpoint_name
from lit_model.checksum import weights_checksum
from lit_model.hf.io import open_tensors
from pretrain.release.manifest import (
    MANIFEST,
    Manifest,
    Weights,
    describe_file,
    files_in,
    read_link,
    settings_digest,
)
from pretrain.release.verify import open_folder, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHORT = (
    *("--train.max_steps=6", "--save.every_steps=2", "--eval.every_steps=100", "--log.every_steps=1"),
    *(
        "--train.global_batch_samples=8",
        "--train.micro_batch_samples=2",
        "--optim.warmup_steps=1",
        "--log.report=false",
    ),
)
RELEASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "llama": ("llama", (), "all"),
    "gpt2-fsdp2": ("gpt2", ("--devices=2", "--strategy=fsdp", "--save.state_dict_type=sharded"), "all"),
    "gemma2-ddp2": ("gemma2", ("--devices=2", "--strategy=ddp"), "none"),
    "other": ("llama", ("--seed=7",), "all"),
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound releases of three revisions, step2, step4 and step6."""
    top, found = tmp_path_factory.mktemp("releases"), {}
    for name, (family, flags, state) in RELEASES.items():
        run = train_family(family, top / f"run-{name}", *SHORT, *flags)
        done = script("publish.py", run, "--to", top / name, "--training_state", state)
        assert done.returncode == 0, done.stderr
        assert verify(open_folder(top / name)).faults == []
        found[name] = top / name
    return found


def change(revision: Path, **fields: Any) -> None:
    """Rewrite a manifest with other fields."""
    manifest = replace(read_link(revision).manifest, **fields)
    (revision / MANIFEST).write_bytes(manifest.to_bytes())


def refit(revision: Path, **fields: Any) -> None:
    """Forge a manifest so that it fits the revision's files."""
    manifest = read_link(revision).manifest
    tensors = open_tensors(revision)
    record = [content(revision, part) for part in manifest.record]
    config = yaml.safe_load((revision / "run" / "config.yaml").read_text())
    fitting: dict[str, Any] = {
        "files": {path: describe_file(revision / path) for path in files_in(revision)},
        "weights": Weights(len(tensors), weights_checksum(tensors.items())),
        "record": record,
        "settings": settings_digest(config),
    }
    change(revision, **(fitting | fields))


def content(revision: Path, part: RecordContent) -> RecordContent:
    try:
        return scan_record(revision / "run", part.first_step, part.end_step).content
    except ValueError:
        return part


def refit_all(release: Path) -> None:
    """Forge the manifests of a release, and their chain, to fit its files."""
    before = None
    for step in (2, 4, 6):
        revision = release / f"step{step}"
        refit(revision, previous=before.previous if before else None)
        before = read_link(revision)


def flip(path: Path, at: float = 0.5) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def edit(path: Path, change_of: Callable[[Any], None]) -> None:
    """Change the content of a JSON or YAML file."""
    kind: Any = json if path.suffix == ".json" else yaml
    value = kind.loads(path.read_text()) if kind is json else yaml.safe_load(path.read_text())
    change_of(value)
    path.write_text(json.dumps(value) if kind is json else yaml.safe_dump(value, sort_keys=False))


def edit_record(path: Path, column: str, change_of: Callable[[Any], Any]) -> None:
    table = pq.read_table(path)
    values = change_of(table[column].to_numpy().copy())
    index = table.schema.get_field_index(column)
    table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    pq.write_table(table, path, write_statistics=True)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def everywhere(release: Path, step: int, path: str) -> list[Path]:
    """A file of the record in all revisions from a step on."""
    return [release / f"step{s}" / path for s in (2, 4, 6) if s >= step]


WEIGHTS = "model.safetensors"
RECORD = "run/datapoints/steps-00000002-00000004.parquet"


def another_record(release: Path, other: Path) -> None:
    for path in everywhere(release, 4, RECORD):
        shutil.copy(other / "step4" / RECORD, path)


def without_a_row(release: Path) -> None:
    for path in everywhere(release, 4, RECORD):
        table = pq.read_table(path)
        pq.write_table(table.slice(0, table.num_rows - 1), path)


def swapped_samples(release: Path) -> None:
    def change_of(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        first, last = values.min(), values.max()
        return np.where(values == first, last, np.where(values == last, first, values))

    for path in everywhere(release, 4, RECORD):
        edit_record(path, "sample", change_of)


def later_record(release: Path) -> None:
    """The record of steps 4 and 5 under the name of steps 2 and 3."""
    source = release / "step6" / "run/datapoints/steps-00000004-00000006.parquet"
    for path in everywhere(release, 4, RECORD):
        shutil.copy(source, path)


def another_tokenizer(folder: Path) -> None:
    path = next(folder.glob("tokenizer.json"))

    def exchange(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        one, other = list(vocabulary)[-1], list(vocabulary)[-2]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit(path, exchange)


def set_in(path: Path, *keys: str, to: object) -> None:
    def change_of(value: dict[str, Any]) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    edit(path, change_of)


def add_metrics(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\r\n".join([*lines, "9" + lines[-1][1:]]) + "\r\n")


def another_loss(path: Path) -> None:
    """Another training loss of the first step."""
    lines = [line.split(",") for line in path.read_text().splitlines()]
    first = next(line for line in lines if line[0] == "1")
    first[lines[0].index("train_loss")] = "1.25"
    path.write_text("\r\n".join(map(",".join, lines)) + "\r\n")


def wrong_manifest_path(revision: Path) -> None:
    manifest = read_link(revision).manifest
    change(revision, files={**manifest.files, "../../etc/passwd": manifest.files["config.json"]})


def relink(release: Path, target: str | None) -> None:
    (release / "main").unlink()
    if target is not None:
        (release / "main").symlink_to(target)


def forged(plant: Callable[[Path], object]) -> Callable[[Path], None]:
    """Plant a fault and forge all manifests to fit."""

    def work(release: Path) -> None:
        plant(release)
        refit_all(release)

    return work


def weights_of(release: Path, source: str, target: str) -> None:
    shutil.copy(release / source / WEIGHTS, release / target / WEIGHTS)


def one_forged(plant: Callable[[Path], object], revision: str) -> Callable[[Path], None]:
    """Plant a fault and forge the manifest of one revision."""

    def work(release: Path) -> None:
        plant(release)
        refit(release / revision)

    return work


def data_of(manifest: Manifest) -> dict[str, Any]:
    return {"data": ["0" * len(name) for name in manifest.data]}


# name -> (the releases to plant it in, the plant, part of a line that must be reported)
ALL = ("llama", "gpt2-fsdp2", "gemma2-ddp2")
STATE = ALL[:2]  # with training state
Plant = tuple[tuple[str, ...], Callable[[Path], object], str]
FAULTS: dict[str, Plant] = {
    "final weights early": (ALL, lambda r: weights_of(r, "step6", "step2"), f"step2: {WEIGHTS}: its SHA-256"),
    "final weights early, one manifest forged": (
        ALL,
        one_forged(lambda r: weights_of(r, "step6", "step2"), "step2"),
        f"step2: {WEIGHTS}: the same weights as step6",
    ),
    "final weights early, chain forged": (
        ALL,
        forged(lambda r: weights_of(r, "step6", "step2")),
        f"step2: {WEIGHTS}: the same weights as step6",
    ),
    "final weights early, chain forged, by the state": (
        STATE,
        forged(lambda r: weights_of(r, "step6", "step2")),
        f"step2: {WEIGHTS}: the exported weights are not those",
    ),
    "final revision early": (
        ALL,
        lambda r: (shutil.rmtree(r / "step2"), shutil.copytree(r / "step6", r / "step2")),
        "step2: release.json: it is the",
    ),
    "two revisions exchanged": (
        ALL,
        lambda r: swap(r / "step2", r / "step4"),
        "step2: release.json: it is the manifest of step4",
    ),
    "weights exchanged": (
        ALL,
        lambda r: swap(r / "step2" / WEIGHTS, r / "step4" / WEIGHTS),
        f"step4: {WEIGHTS}: its SHA-256",
    ),
    "weights exchanged, chain forged": (
        STATE,
        forged(lambda r: swap(r / "step2" / WEIGHTS, r / "step4" / WEIGHTS)),
        f"step4: {WEIGHTS}: the exported weights",
    ),
    "missing weights": (ALL, lambda r: (r / "step4" / WEIGHTS).unlink(), f"step4: {WEIGHTS}: it is missing"),
    "missing shard of the state": (
        ("gpt2-fsdp2",),
        lambda r: (r / "step4/run" / checkpoint_name(4) / "__0_0.distcp").unlink(),
        "__0_0.distcp: it is missing",
    ),
    "flipped bit of the weights": (ALL, lambda r: flip(r / "step4" / WEIGHTS), f"step4: {WEIGHTS}: its SHA-256"),
    "flipped bit of the weights, one manifest forged": (
        STATE,
        one_forged(lambda r: flip(r / "step6" / WEIGHTS), "step6"),
        f"step6: {WEIGHTS}: the exported weights",
    ),
    "flipped bit of the state": (
        ("llama",),
        lambda r: flip(r / "step4/run" / checkpoint_name(4)),
        "ckpt.pth: its SHA-256",
    ),
    "flipped bit of the state, chain forged": (
        ("llama",),
        forged(lambda r: flip(r / "step4/run" / checkpoint_name(4))),
        f"step4: run/{checkpoint_name(4)}",
    ),
    "no training state": (
        ("llama",),
        lambda r: (r / "step4/run" / checkpoint_name(4)).unlink(),
        f"step4: run/{checkpoint_name(4)}: it is missing",
    ),
    "state of another step, chain forged": (
        ("llama",),
        forged(lambda r: shutil.copy(r / "step6/run" / checkpoint_name(6), r / "step4/run" / checkpoint_name(4))),
        "its step: 6; the manifest says 4",
    ),
    "record of another range": (ALL, later_record, f"step4: {RECORD}: it has"),
    "record of another range, chain forged": (
        ALL,
        forged(later_record),
        "step4: run/datapoints: run: the record has no rows of step 2",
    ),
    "record without a row, chain forged": (ALL, forged(without_a_row), "were seen"),
    "record with two samples exchanged, chain forged": (ALL, forged(swapped_samples), "are not those of the order"),
    "record of another run, chain forged": (("llama",), None, "is not that of the record"),
    "other learning rate": (
        ALL,
        lambda r: set_in(r / "step4/run/config.yaml", "optim", "lr", to=0.1),
        "config.yaml: it has",
    ),
    "other learning rate, chain forged": (
        ALL,
        forged(lambda r: set_in(r / "step4/run/config.yaml", "optim", "lr", to=0.1)),
        "step4: run/config.yaml: optim.lr is",
    ),
    "other model config": (
        ALL,
        lambda r: set_in(r / "step2/config.json", "vocab_size", to=9),
        "step2: config.json: it has",
    ),
    "other model config, chain forged": (
        ALL,
        forged(lambda r: set_in(r / "step2/config.json", "vocab_size", to=9)),
        "step2: config.json: vocab_size is 9",
    ),
    "other tokens in a manifest": (
        ALL,
        lambda r: change(r / "step6", tokens=10**9),
        "step6: release.json: its record has",
    ),
    "other data in the manifests": (
        ALL,
        lambda r: change(r / "step6", **data_of(read_link(r / "step6").manifest)),
        "step6: run/config.yaml: the data differs",
    ),
    "broken chain": (
        ALL,
        lambda r: change(r / "step4", previous=replace(read_link(r / "step2").previous, sha256="0" * 64)),
        "step4: release.json: it names 0000",
    ),
    "a manifest rewritten": (ALL, lambda r: change(r / "step2", words=5), "step4: release.json: it names"),
    "beginning a chain anew": (
        ALL,
        lambda r: change(r / "step4", previous=None),
        "step4: release.json: it names no revision before it; step2",
    ),
    "a missing revision": (
        ALL,
        lambda r: shutil.rmtree(r / "step4"),
        "step6: release.json: it names step4 as the revision before it, which is missing; step2",
    ),
    "a missing manifest": (ALL, lambda r: (r / "step4" / MANIFEST).unlink(), "step4: release.json: it is missing"),
    "a damaged manifest": (ALL, lambda r: flip(r / "step4" / MANIFEST, 0.0), "step4: release.json: it is not JSON"),
    "a manifest with a path outside": (
        ALL,
        lambda r: wrong_manifest_path(r / "step6"),
        "it names the file '../../etc/passwd'",
    ),
    "an additional file": (
        ALL,
        lambda r: (r / "step6/modeling.py").write_text("import os"),
        "step6: modeling.py: it is not in",
    ),
    "an old tokenizer": (ALL, lambda r: another_tokenizer(r / "step6"), "step6: tokenizer.json: it has"),
    "an old tokenizer, chain forged": (
        ALL,
        forged(lambda r: another_tokenizer(r / "step6")),
        "step6: tokenizer.json: another tokenizer than in training",
    ),
    "an old tokenizer of the run, chain forged": (
        ALL,
        forged(lambda r: another_tokenizer(r / "step6/run/tokenizer")),
        "step6: run/tokenizer: another tokenizer",
    ),
    "main is an early revision": (
        ALL,
        lambda r: relink(r, "step2"),
        "main: it is an alias of step2; it must be one of step6",
    ),
    "no main": (ALL, lambda r: relink(r, None), "main: it is missing"),
    "metrics of later steps, chain forged": (
        ALL,
        forged(lambda r: add_metrics(r / "step4/run/metrics.csv")),
        "step4: run/metrics.csv: it continues to step 9",
    ),
    "another loss in metrics of an earlier interval, chain forged": (
        ALL,
        forged(lambda r: another_loss(r / "step6/run/metrics.csv")),
        "step6: run/metrics.csv: the loss of step 1 is not that of the record",
    ),
    "a key added to the model config, chain forged": (
        ALL,
        forged(lambda r: set_in(r / "step6/config.json", "sliding_chunk", to=64)),
        "step6: config.json: sliding_chunk is 64",
    ),
    "manifest without a record": (
        ALL,
        lambda r: change(r / "step6", record=[]),
        "step6: release.json: its record does not cover steps 0 to 5",
    ),
    "a link to a folder": (
        ALL,
        lambda r: (r / "step6/more").symlink_to(r / "step2"),
        "step6: more: it is not in the manifest",
    ),
    "another order, chain forged": (
        ALL,
        forged(
            lambda r: set_in(
                r / "step4/run/datapoints/order.json",
                "segments",
                to=[{"from_step": 0, "first_sample": 8, "global_batch": 8}],
            )
        ),
        "order.json: its segments are not",
    ),
    "another card": (
        ALL,
        lambda r: (r / "step4/README.md").write_text("Better than all others."),
        "step4: README.md: it has",
    ),
    "a truncated file": (
        ALL,
        lambda r: (r / "step4/run/environment.jsonl").write_bytes(b""),
        "step4: run/environment.jsonl: it has 0 bytes",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_named(name: str, releases: dict[str, Path], tmp_path: Path) -> None:
    where, plant, expected = FAULTS[name]
    for release in where:
        copy = Path(shutil.copytree(releases[release], tmp_path / release, symlinks=True))
        (plant or forged(partial(another_record, other=releases["other"])))(copy)
        lines = [str(fault) for fault in verify(open_folder(copy)).faults]
        assert [line for line in lines if expected in line], (release, expected, lines)


def test_another_release_is_found_by_the_head(releases: dict[str, Path]) -> None:
    head = read_link(releases["llama"] / "step6").sha256
    assert not verify(open_folder(releases["llama"]), head=head).faults
    (fault,) = verify(open_folder(releases["other"]), head=head).faults
    assert str(fault) == f"step6: release.json: the head is not {head}"
