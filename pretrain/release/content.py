"""Checks that the files of one revision belong together: weights, checkpoint, settings, tokenizer, record and metrics.

These checks find a revision whose manifest was rewritten to match other files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_data.loading.order import Segment
from lit_data.record.content import RecordScan, scan_record
from lit_data.record.order_file import OrderFacts
from lit_data.record.parts import list_parts
from lit_eval.metrics_file import Metrics, read_metrics
from lit_eval.model.model_tokenizer import (
    KnownTokenizer,
    compare,
    describe_difference,
    facts_of,
    find_tokenizer,
    of_files,
)
from lit_eval.run_facts import read_settings
from lit_files.checkpoint_name import checkpoint_name, list_checkpoints
from lit_files.reading import first_line, read_dataclass, read_foreign_object
from lit_files.run_files import DATAPOINTS, METRICS, ORDER, SETTINGS
from lit_model.checksum import weights_checksum
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import open_tensors
from lit_model.load import WITHOUT_TENSORS, Checkpoint
from lit_model.tensor_file import DAMAGED
from pretrain.release.manifest import RUN, Manifest, digest, settings_digest
from pretrain.release.revision import names_of
from pretrain.resume import changes_of

LOSS_TOLERANCE = 1e-3  # relative; metrics.csv and the record sum the same token losses in other orders

Found = tuple[str, str]
"""A fault: the file's path in the revision, and a sentence."""
Scanned = dict[tuple[str, ...], RecordScan]
"""Intervals of the record already read, by the checksums of their content and files: revisions share them."""


def content_faults(folder: Path, manifest: Manifest, scanned: Scanned) -> Iterator[Found]:
    """The faults of a revision in a folder. What is read of the record is added to `scanned`."""
    meta: dict[str, Any] = {}
    name = f"{RUN}/{checkpoint_name(manifest.step)}"

    def checkpoint_faults() -> Iterator[Found]:
        present = [path.name for path in list_checkpoints(folder / RUN)]
        for other in present:
            if other != checkpoint_name(manifest.step):
                yield f"{RUN}/{other}", f"it is a checkpoint of another step than {manifest.step}"
        checkpoint = Checkpoint(folder / name)
        meta.update(checkpoint.meta)
        for text in meta_faults(meta, manifest):
            yield name, text
        yield from config_faults(folder, checkpoint)
        if manifest.training_state:
            yield from ((name, text.replace(f"{folder}/", "")) for text in checkpoint.verify())
            tensors = tensors_to_hf(checkpoint.model_config, checkpoint.passing_tensors())
            if weights_checksum(tensors) != manifest.weights.sha256:
                yield (
                    "model.safetensors",
                    f"the exported weights are not those of the checkpoint of step {manifest.step}",
                )

    def weights_faults() -> Iterator[Found]:
        tensors = open_tensors(folder)
        if weights_checksum(tensors.items()) != manifest.weights.sha256:
            yield "model.safetensors", "the weights' checksum differs from the manifest's"

    checks: list[tuple[str, Callable[[], Iterator[Found]]]] = [
        (name, checkpoint_faults),
        ("model.safetensors", weights_faults),
        (f"{RUN}/{SETTINGS}", lambda: settings_faults(folder, meta, manifest)),
        ("tokenizer.json", lambda: tokenizer_faults(folder, meta)),
        (f"{RUN}/{DATAPOINTS}", lambda: record_faults(folder, meta, manifest, scanned)),
    ]
    for path, check in checks:
        try:
            yield from check()
        except (*DAMAGED, OSError, ArithmeticError) as error:
            yield path, first_line(error).replace(f"{folder}/", "")


def meta_faults(meta: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    """Differences between a checkpoint's facts and the manifest."""
    data = meta.get("data") or {}
    pairs = {
        "step": (meta.get("step"), manifest.step),
        "tokens": (meta.get("tokens"), manifest.tokens),
        "words": (meta.get("words"), manifest.words),
        "names": (names_of(meta), [manifest.revision, *manifest.aliases]),
        "data fingerprints": (data.get("train"), manifest.data),
        "tokenizer fingerprint": (facts_of(meta).get("fingerprint"), manifest.tokenizer),
        "changes of settings": (changes_of(meta, "its meta"), manifest.changes),
        "training state": (not meta.get(WITHOUT_TENSORS, False), manifest.training_state),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            yield f"its {what}: {found!r:.100}; the manifest says {expected!r:.100}"
    if digest(meta.get("model_config")) != manifest.model:
        yield "its model config differs from the manifest's"
    if settings_digest(meta.get("config") or {}) != manifest.settings:
        yield "its settings differ from the manifest's"


def config_faults(folder: Path, checkpoint: Checkpoint) -> Iterator[Found]:
    """Where config.json is not the export of the checkpoint's model."""
    hf = read_foreign_object(folder / "config.json")
    ids = {"bos_id": hf.get("bos_token_id"), "eos_id": hf.get("eos_token_id")}
    dtype = hf.get("dtype", "float32")
    expected = json.loads(json.dumps(config_to_hf(checkpoint.model_config, **ids, dtype=dtype)))
    for key in sorted(hf.keys() | expected.keys()):
        if key not in hf or key not in expected or hf[key] != expected[key]:
            found, wanted = (f"{values[key]!r:.60}" if key in values else "missing" for values in (hf, expected))
            yield "config.json", f"{key} is {found}; in an export of the checkpoint's model it is {wanted}"


def settings_faults(folder: Path, meta: dict[str, Any], manifest: Manifest) -> Iterator[Found]:
    """Differences between run/config.yaml, the checkpoint's config and the manifest."""
    settings = read_settings(folder / RUN / SETTINGS)
    if settings_digest(settings) != manifest.settings:
        yield f"{RUN}/{SETTINGS}", "its settings differ from the manifest's"
    elif meta and settings != (expected := meta["config"] | {"resume": None}):
        keys = sorted(key for key in settings.keys() | expected.keys() if settings.get(key) != expected.get(key))
        yield f"{RUN}/{SETTINGS}", f"it differs from the checkpoint's config in {', '.join(keys) or 'missing settings'}"


def tokenizer_faults(folder: Path, meta: dict[str, Any]) -> Iterator[Found]:
    """Tokenizers that are not the one the model was trained with."""
    trained = KnownTokenizer(facts_of(meta))
    for place in ("", f"{RUN}/"):
        files = find_tokenizer(folder) if not place else folder / RUN / "tokenizer"
        if files is None or not files.exists():
            continue
        path = "tokenizer.json" if not place else f"{RUN}/tokenizer"
        known = of_files(files)
        if known.unreadable is not None:
            yield path, f"it cannot be opened: {known.unreadable}"
        elif compare(known, trained) == "different":
            yield (
                path,
                f"another tokenizer than in training: {describe_difference(known, trained, 'the training data')}",
            )


def record_faults(folder: Path, meta: dict[str, Any], manifest: Manifest, scanned: Scanned) -> Iterator[Found]:
    """Where the record contradicts the manifest, the order, the checkpoint or the metrics."""
    run, base = folder / RUN, f"{RUN}/{DATAPOINTS}"
    order = read_dataclass(OrderFacts, run / DATAPOINTS / ORDER)
    segments = [Segment(**s) for s in meta["segments"]] if meta else order.segments
    if order.segments != segments:
        yield f"{base}/{ORDER}", "its segments are not those of the checkpoint"
    if [dataset.fingerprint for dataset in order.datasets] != manifest.data:
        yield f"{base}/{ORDER}", "its datasets differ from the manifest's"
    files = list_parts(run / DATAPOINTS)
    for file in files:
        if file.end_step > manifest.step or file.rank is not None:
            yield f"{base}/{file.path.name}", f"it is not a merged file of steps before {manifest.step}"
    logged = read_metrics(run / METRICS) if (run / METRICS).is_file() else None
    if logged is not None and (logged.last("step") or 0) > manifest.step:
        yield f"{RUN}/{METRICS}", f"it continues to step {logged.last('step'):.0f}, beyond the revision"
    for part in manifest.record:
        names = [p.path.name for p in files if part.first_step <= p.first_step < part.end_step]
        hashes = [manifest.files[f"{base}/{n}"].sha256 for n in names if f"{base}/{n}" in manifest.files]
        key = (f"{part.first_step}-{part.end_step}", part.sha256, *hashes)
        if key not in scanned:
            where = f"{base}/{names[0]}" if names else base
            scanned[key] = scan = scan_record(run, part.first_step, part.end_step, segments)
            if scan.content != part:
                differing = [k for k, v in vars(part).items() if getattr(scan.content, k) != v]
                yield where, f"its content differs from the manifest's record in {', '.join(differing)}"
            yield from ((where, text) for text in scan.faults)
        if logged is not None:
            yield from ((f"{RUN}/{METRICS}", text) for text in loss_faults(logged, scanned[key]))


def loss_faults(logged: Metrics, scan: RecordScan) -> Iterator[str]:
    """The first step of an interval whose loss in metrics.csv is not that of the record. NaN equals NaN."""
    first, steps = scan.content.first_step, logged["step"]
    inside = (steps > first) & (steps <= scan.content.end_step) & logged.written.get("train_loss", False)
    recorded, found = scan.losses[steps[inside].astype(np.int64) - 1 - first], logged["train_loss"][inside]
    off = ~np.isclose(found, recorded, rtol=LOSS_TOLERANCE, atol=0.0, equal_nan=True)
    if off.any():
        yield f"the loss of step {steps[inside][off][0]:.0f} is not that of the record"
