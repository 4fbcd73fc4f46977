"""Copies a tokenizer's files, beside a dataset, a run or an exported model."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from lit_data.tokenizers.tokenizer import COMPANIONS, MAIN_FILES, Tokenizer, companions_in, open_tokenizer
from lit_files.publish import build_folder, write_json
from lit_files.reading import read_foreign_object


def copy_tokenizer(source_folder: str | Path, target_folder: str | Path) -> None:
    """Copy a tokenizer's files (but no others, e.g. weights) to a new folder, atomically."""
    source = Path(source_folder)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a tokenizer's folder")
    files = tokenizer_files(source)
    if not files:
        names = ", ".join((*MAIN_FILES, *COMPANIONS))
        raise ValueError(f"{source} contains no tokenizer: none of its files matches {names}")
    _copy_files(files, source, Path(target_folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder, without any others, such as weights."""
    main = [file for pattern in MAIN_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    return [*main, *companions_in(folder)]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy an opened tokenizer's files to a new folder; the copy declares its EOS token."""
    _copy_files(tokenizer.files, tokenizer.path.parent, folder)
    _name_eos(folder, tokenizer)


def _copy_files(files: Sequence[Path], source: Path, target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or choose another folder")
    with build_folder(target) as temporary:
        for file in files:
            name = file.relative_to(source)
            if file.suffix == ".json" and not any(name.match(pattern) for pattern in COMPANIONS):
                name = Path("tokenizer.json")  # under another name it would not be found in a folder
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, temporary / name)


def _name_eos(folder: Path, tokenizer: Tokenizer) -> None:
    """Declare EOS in a copied tokenizer that did not (--eos_token)."""
    with contextlib.suppress(ValueError):
        if open_tokenizer(folder).eos_id == tokenizer.eos_id:
            return
    path = folder / "tokenizer_config.json"
    content = read_foreign_object(path) if path.exists() else {}
    write_json(path, content | {"eos_token": tokenizer.eos_token})
    copied = open_tokenizer(folder)
    assert (copied.eos_id, copied.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint), f"{folder} is no true copy"
