"""Checks that the files of one revision belong together: weights, checkpoint, settings, tokenizer, record and metrics.

The manifest says what the files were; these checks find a revision whose manifest was written anew to fit other files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_data.loading.order import Segment
from lit_data.record.content import scan_record
from lit_data.record.order_file import ORDER_FILE, OrderFacts
from lit_data.record.parts import list_parts
from lit_eval.metrics_file import read_metrics
from lit_eval.model.model_tokenizer import (
    KnownTokenizer,
    compare,
    describe_difference,
    facts_of,
    find_tokenizer,
    of_files,
)
from lit_eval.run_facts import SETTINGS, read_settings
from lit_files.checkpoint_name import checkpoint_name, list_checkpoints
from lit_files.reading import read_dataclass, read_foreign_object
from lit_model.checksum import weights_checksum
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import open_tensors
from lit_model.load import WITHOUT_TENSORS, Checkpoint
from pretrain.logs.metrics import FILE as METRICS
from pretrain.release.manifest import RUN, Manifest, digest, settings_digest
from pretrain.release.revision import names_of

LOSS_TOLERANCE = 1e-3  # relative; metrics.csv and the record sum the same token losses in other orders

Found = tuple[str, str]
"""A fault: the file's path in the revision, and a sentence."""


def content_faults(folder: Path, manifest: Manifest, scanned: set[tuple[str, ...]]) -> Iterator[Found]:
    """The faults of a revision in a folder, whose files are those of its manifest.

    Args:
        scanned: files of the record already checked, by steps and checksums; extended.
    """
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
            yield "model.safetensors", "the weights are not those that the manifest names"

    checks: list[tuple[str, Callable[[], Iterator[Found]]]] = [
        (name, checkpoint_faults),
        ("model.safetensors", weights_faults),
        (f"{RUN}/{SETTINGS}", lambda: settings_faults(folder, meta, manifest)),
        ("tokenizer.json", lambda: tokenizer_faults(folder, meta)),
        (f"{RUN}/datapoints", lambda: record_faults(folder, meta, manifest, scanned)),
    ]
    for path, check in checks:
        try:
            yield from check()
        except (ValueError, OSError, LookupError, TypeError) as error:
            yield path, str(error).replace(f"{folder}/", "").splitlines()[0]


def meta_faults(meta: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    """Where a checkpoint's facts are not those of the manifest."""
    data = meta.get("data") or {}
    pairs = {
        "step": (meta.get("step"), manifest.step),
        "tokens": (meta.get("tokens"), manifest.tokens),
        "words": (meta.get("words"), manifest.words),
        "names": (names_of(meta), [manifest.revision, *manifest.aliases]),
        "data fingerprints": (data.get("train"), manifest.data),
        "tokenizer fingerprint": (facts_of(meta).get("fingerprint"), manifest.tokenizer),
        "changes of settings": (meta.get("changes") or [], manifest.changes),
        "training state": (not meta.get(WITHOUT_TENSORS, False), manifest.training_state),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            yield f"its {what}: {found!r:.100}; the manifest says {expected!r:.100}"
    if digest(meta.get("model_config")) != manifest.model:
        yield "its model config is not the one that the manifest names"
    if settings_digest(meta.get("config") or {}) != manifest.settings:
        yield "its settings are not those that the manifest names"


def config_faults(folder: Path, checkpoint: Checkpoint) -> Iterator[Found]:
    """Where config.json describes another model than the checkpoint's."""
    hf = read_foreign_object(folder / "config.json")
    ids = {"bos_id": hf.get("bos_token_id"), "eos_id": hf.get("eos_token_id")}
    expected = config_to_hf(checkpoint.model_config, **ids, dtype=hf.get("dtype", "float32"))
    for key, value in json.loads(json.dumps(expected)).items():
        if key in hf and hf[key] != value:
            yield "config.json", f"{key} is {hf[key]!r:.60}; the checkpoint's model has {value!r:.60}"


def settings_faults(folder: Path, meta: dict[str, Any], manifest: Manifest) -> Iterator[Found]:
    """Where run/config.yaml is not the checkpoint's config."""
    settings = read_settings(folder / RUN / SETTINGS)
    if settings_digest(settings) != manifest.settings:
        yield f"{RUN}/{SETTINGS}", "its settings are not those that the manifest names"
    elif meta and settings != meta["config"] | {"resume": None}:
        differing = [k for k, v in settings.items() if k != "resume" and v != meta["config"].get(k)]
        yield (
            f"{RUN}/{SETTINGS}",
            f"it is not the checkpoint's config: {', '.join(differing) or 'settings are missing'}",
        )


def tokenizer_faults(folder: Path, meta: dict[str, Any]) -> Iterator[Found]:
    """Where a tokenizer is not the one that the model was trained with."""
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


def record_faults(
    folder: Path, meta: dict[str, Any], manifest: Manifest, scanned: set[tuple[str, ...]]
) -> Iterator[Found]:
    """Where the record is not that of the manifest's steps, or contradicts order, checkpoint or metrics."""
    run, base = folder / RUN, f"{RUN}/datapoints"
    order = read_dataclass(OrderFacts, run / "datapoints" / ORDER_FILE)
    segments = [Segment(**s) for s in meta["segments"]] if meta else order.segments
    if order.segments != segments:
        yield f"{base}/{ORDER_FILE}", "its segments are not those of the checkpoint"
    if [dataset.fingerprint for dataset in order.datasets] != manifest.data:
        yield f"{base}/{ORDER_FILE}", "its datasets are not those that the manifest names"
    files = list_parts(run / "datapoints")
    for file in files:
        if file.end_step > manifest.step or file.rank is not None:
            yield f"{base}/{file.path.name}", f"it is not a merged file of steps before {manifest.step}"
    logged = read_metrics(run / METRICS) if (run / METRICS).is_file() else None
    if logged is not None and (logged.last("step") or 0) > manifest.step:
        yield f"{RUN}/{METRICS}", f"it goes on to step {logged.last('step'):.0f}, beyond the revision"
    for part in manifest.record:
        names = [p.path.name for p in files if part.first_step <= p.first_step < part.end_step]
        key = (part.sha256, *(manifest.files[f"{base}/{n}"].sha256 for n in names if f"{base}/{n}" in manifest.files))
        if key in scanned:
            continue
        where = f"{base}/{names[0]}" if names else base
        scan = scan_record(run, part.first_step, part.end_step, segments)
        if scan.content != part:
            differing = [k for k, v in vars(part).items() if getattr(scan.content, k) != v]
            yield where, f"it is not the record that the manifest names: {', '.join(differing)} differ"
        yield from ((where, text) for text in scan.faults)
        if logged is not None:
            steps = logged["step"]
            inside = (steps > part.first_step) & (steps <= part.end_step)
            mine = scan.losses[steps[inside].astype(np.int64) - 1 - part.first_step]
            off = np.abs(mine - logged["train_loss"][inside]) > LOSS_TOLERANCE * np.abs(mine)
            if off.any():
                yield f"{RUN}/{METRICS}", f"the loss of step {steps[inside][off][0]:.0f} is not that of the record"
        scanned.add(key)
