"""Reads files of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from lit_files.reading import open_regular


def read_prompts(path: Path) -> list[str]:
    """The prompts of a .txt, one a line, or of a .jsonl, in its field "prompt". Blank lines are skipped.

    Raises ValueError naming the file, and the line that is wrong; FileNotFoundError.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f'{path}: give a .txt with a prompt a line, or a .jsonl with the field "prompt"')
    if not path.exists():
        raise FileNotFoundError(f"no file of prompts at {path}")
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append(line.removesuffix("\r"))
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a string in the field "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts
