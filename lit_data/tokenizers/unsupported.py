"""Recognizes unsupported tokenizer formats by content and explains how to convert them to a tokenizer.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a line of tiktoken: a token in base64, and its rank
_HEAD_BYTES = 4096


def describe_foreign(path: Path) -> str | None:
    """Describe a file or folder in another tokenizer format, and how to convert it.

    None for anything else.
    """
    if path.is_dir():
        return _describe_folder(path)
    with open(path, "rb") as f:
        head = f.read(_HEAD_BYTES)
    if _RANK.match(head):
        return (
            f"{path} is a vocabulary of tiktoken, which lacks the pattern and the special tokens of its tokenizer: "
            "take the tokenizer.json beside the model on the Hugging Face Hub, or " + _save(path.parent)
        )
    if path.name == "merges.txt" or head.startswith(b"#version:"):
        return _merges(path)
    if path.name == "vocab.txt":
        return f"{path} is the vocabulary of a WordPiece tokenizer alone; " + _save(path.parent)
    if head.startswith((b"\x80", b"PK")) or path.suffix in (".pkl", ".pickle", ".pt"):
        return f"{path} is a pickle or an archive, which is not opened here: it can run code; " + _save(path.parent)
    if path.suffix == ".vocab" and path.with_suffix(".model").is_file():
        return f"{path} lists the pieces of {path.with_suffix('.model')}: give that one"
    return _describe_json(path) if head.lstrip()[:1] == b"{" else None


def _describe_folder(folder: Path) -> str | None:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _merges(folder)
    names = ("tekken.json", "vocab.txt", "*.tiktoken", "tokenizer.pkl", "vocab.json", "*.tekken")
    files = [f for name in names for f in sorted(folder.glob(name))]
    return next((found for f in files if (found := describe_foreign(f)) is not None), None)


def _describe_json(path: Path) -> str | None:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or isinstance(content.get("model"), dict):
        return None
    if isinstance(content.get("vocab"), list) and "config" in content:
        return f"{path} is a tokenizer of Mistral (tekken); " + _save(path.parent)
    if content and all(isinstance(id, int) for id in content.values()):
        return _merges(path)
    if "tokenizer_class" in content or "eos_token" in content:
        return f"{path} holds the settings of a tokenizer, not its vocabulary: give its folder, or a tokenizer.json"
    return None


def _merges(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    holds = "holds" if path.is_dir() else "is one of"
    return (
        f"{path} {holds} vocab.json and merges.txt, which don't say how text is split; {_save(folder)} "
        "(GPT2TokenizerFast in place of AutoTokenizer where no other file of the folder names a class)"
    )


def _save(folder: Path) -> str:
    return (
        'have transformers write it: python -c "from transformers import AutoTokenizer; '
        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\", and give the new folder"
    )
