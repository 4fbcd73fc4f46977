"""Fingerprints of tokenizers: SHA-256 over everything that decides the ids, whatever the layout of the file."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lit_data.tokenizers.sentencepiece_file import ModelType, SentencepieceFile


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def fingerprint_of_json(content: dict[str, Any]) -> str:
    """Of the content of a tokenizer.json."""
    model = {key: value for key, value in content["model"].items() if key != "dropout"}
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    if isinstance(model.get("merges"), list):
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    parts = {key: content.get(key) for key in ("normalizer", "pre_tokenizer")}
    added = sorted(content.get("added_tokens") or [], key=lambda token: int(token["id"]))
    return _digest(["tokenizers", _without_defaults({**parts, "model": model, "added_tokens": added})])


def _without_defaults(value: Any) -> Any:
    """Drop keys that are null or false, which only some programs write."""
    if isinstance(value, dict):
        return {k: _without_defaults(v) for k, v in value.items() if v is not None and v is not False}
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return [_without_defaults(v) for v in value]
    return value


def fingerprint_of_sentencepiece(content: SentencepieceFile) -> str:
    """Of a sentencepiece model."""
    return _digest(
        [
            "sentencepiece",
            ModelType(content.model_type).name,
            [[p.text, float.hex(p.score), int(p.type)] for p in content.pieces],
            content.byte_fallback,
            content.treat_whitespace_as_suffix,
            hashlib.sha256(content.precompiled_charsmap).hexdigest(),
            content.add_dummy_prefix,
            content.remove_extra_whitespaces,
            content.escape_whitespaces,
        ]
    )
