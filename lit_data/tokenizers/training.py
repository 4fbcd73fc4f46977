"""Trains a tokenizer on text: byte-level BPE (tokenizers) or BPE with byte fallback (sentencepiece).

Both are lossless for every text: no normalisation, no dummy prefix space (so a word at the start of a document is
another token than inside), and byte fallback for characters without a piece.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_data.corpus.cleaners import Cleaner, open_cleaner
from lit_data.corpus.files import (
    ReadErrors,
    TextFile,
    check_output_is_outside,
    list_files,
    mixed_split_names,
    sizes_of,
    train_and_held_out,
)
from lit_data.corpus.readers import read_documents
from lit_data.corpus.separators import check_separator
from lit_data.tokenizers.cutting import cut
from lit_data.tokenizers.hf_export import config_for_transformers
from lit_data.tokenizers.settings import Kind, TokenizerSettings
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_data.tokenizers.trainers import (
    BOS,
    BYTE_BPE_SPECIALS,
    EOS,
    PAD,
    SENTENCEPIECE_ROLES,
    SENTENCEPIECE_SPECIALS,
    byte_bpe,
    sentencepiece_bpe,
)
from lit_files.child import in_child
from lit_files.progress import TaskProgress
from lit_files.publish import build_folder

BYTES = 256
MAX_VOCAB_SIZE = 10_000_000  # trainers preallocate it; ten times the largest vocabulary in use

TEXT_CHARACTERS = 1 << 16  # longer documents are split for the trainer; bounds its memory
LINE_CHARACTERS = 1 << 12
LINE_BYTES = 4 * (LINE_CHARACTERS + 1)
LESS_TEXT = "; train on less text with --max_sample_mb"


def train_tokenizer(settings: TokenizerSettings, errors: ReadErrors | None = None) -> Tokenizer:
    """Train on the documents of files and folders and write the tokenizer's folder, atomically.

    Args:
        errors: counts the documents that were skipped.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: no text, the vocabulary is too small, an unknown cleaner, or the output exists.
    """
    s = settings
    check_arguments(s.vocab_size, s.type, s.output, s.overwrite, s.special_tokens)
    if s.max_sample_mb is not None and s.max_sample_mb < 1:
        raise ValueError(f"--max_sample_mb {s.max_sample_mb}: at least 1 is needed")
    check_output_is_outside(Path(s.output), s.input)
    cleaner = open_cleaner(s.cleaner) if s.cleaner is not None else None
    errors = errors if errors is not None else ReadErrors()
    files = list_files(s.input, errors)
    errors.warnings += check_separator(files, [], s.split_documents)
    mixed = train_and_held_out(files)
    for a, b in [(mixed[0].path, mixed[1].path)] if mixed is not None else mixed_split_names(files):
        errors.warnings.append(f"the tokenizer is trained on {a} and on held-out text, {b}")
    errors.print_warnings()
    options: dict[str, Any] = {
        "on_error": s.on_error,
        "text_field": s.text_field,
        "split_documents": s.split_documents,
        "max_document_mb": s.max_document_mb,
        "errors": errors,
    }
    texts = _texts(files, cleaner, options)
    if s.max_sample_mb is not None:
        texts = _beginnings(files, s.max_sample_mb << 20, cleaner, options)
    source = f"--input {', '.join(s.input)}"
    return train_on_texts(
        texts,
        s.vocab_size,
        s.type,
        s.output,
        special_tokens=s.special_tokens,
        overwrite=s.overwrite,
        source=source,
    )


def _texts(files: Sequence[TextFile], cleaner: Cleaner | None, options: dict[str, Any]) -> Generator[str, None, None]:
    """The texts of the documents, cleaned; those that the cleaner drops are left out."""
    progress, read = TaskProgress(), 0
    size = None if any(file.hub for file in files) else sum(sizes_of(files)) / 1e6

    def count(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes

    with progress.task("reading text"):
        for document in read_documents(files, **options, on_read=count):
            progress(read / 1e6, size, "MB")
            text = document.text if cleaner is None else cleaner(document)
            if text is not None:
                yield text


def _beginnings(
    files: Sequence[TextFile], sample_bytes: int, cleaner: Cleaner | None, options: dict[str, Any]
) -> Generator[str, None, None]:
    """Text from the start of each file, in proportion to its size."""
    sizes = sizes_of(files)
    for file, size in zip(files, sizes, strict=True):
        left = sample_bytes * size // max(1, sum(sizes))
        for text in _texts([file], cleaner, options):
            data = text.encode()
            yield text if len(data) <= left else data[:left].decode("utf-8", "ignore")
            left -= len(data)
            if left <= 0:
                break


def train_on_texts(
    texts: Iterable[str],
    vocab_size: int,
    kind: Kind,
    output: str | Path,
    *,
    special_tokens: Sequence[str] = (),
    overwrite: bool = False,
    source: str = "the text",
) -> Tokenizer:
    """Like `train_tokenizer`, on texts in memory; `source` names them in errors."""
    folder = Path(output)
    check_arguments(vocab_size, kind, folder, overwrite, special_tokens)
    with build_folder(folder, replace=overwrite) as temporary:
        corpus = _Corpus(texts)
        train: Callable[[_Corpus, int, Sequence[str], Path, str], None] = (
            _train_byte_bpe if kind == "byte_bpe" else _train_sentencepiece
        )
        train(corpus, vocab_size, special_tokens, temporary, source)
        open_tokenizer(temporary)
    return open_tokenizer(folder)


def check_arguments(
    vocab_size: int, kind: str, output: Path, overwrite: bool, special_tokens: Sequence[str] = ()
) -> None:
    """Check the arguments before any text is read. Raises ValueError."""
    specials = [*(BYTE_BPE_SPECIALS if kind == "byte_bpe" else SENTENCEPIECE_SPECIALS), *special_tokens]
    for token in special_tokens:
        if not token.strip() or specials.count(token) > 1:
            raise ValueError(
                f"--special_tokens {token!r}: give each token once, not blank, and none of the built-in ones"
            )
    if vocab_size <= BYTES + len(specials):
        raise ValueError(
            f"--vocab_size {vocab_size} is too small: {BYTES} bytes and {len(specials)} special tokens "
            f"({' '.join(specials)}) are always included; give {BYTES + len(specials) + 1} or more"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"--vocab_size {vocab_size} is too large: give {MAX_VOCAB_SIZE} or less")
    if output.suffix in (".json", ".model") and not output.is_dir():
        named = output.stem == "tokenizer" and output.parent.name
        raise ValueError(
            f"--output {output} looks like a file, and a tokenizer is written as a folder: give "
            f"{output.parent if named else output.with_suffix('')}, which will hold "
            f"tokenizer{'.json' if kind == 'byte_bpe' else '.model'}"
        )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists already; choose another folder, or replace it with --overwrite")
    if not any((output / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"--output {output} is not a tokenizer's folder, and --overwrite replaces nothing else; remove it yourself"
        )


def _starts(text: str) -> range:
    return range(0, len(text), LINE_CHARACTERS)


class _Corpus:
    """Iterates over the texts in pieces, and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.n_characters = texts, 0

    def pieces(self) -> Iterator[str]:
        for text in self.texts:
            self.n_characters += len(text.strip())
            yield from cut(text, TEXT_CHARACTERS)

    def lines(self) -> Iterator[str]:
        """Lines without line ends, which sentencepiece encodes as bytes; long ones split."""
        for piece in self.pieces():
            for line in re.split(r"[\r\n]", piece):
                parts = (p[i : i + LINE_CHARACTERS] for p in cut(line, LINE_CHARACTERS // 2) for i in _starts(p))
                yield from (part for part in parts if part and "\0" not in part)

    def check(self, source: str) -> None:
        if not self.n_characters:
            raise ValueError(f"{source} holds no text to train a tokenizer on")


def _train_byte_bpe(corpus: _Corpus, vocab_size: int, special_tokens: Sequence[str], folder: Path, source: str) -> None:
    train = functools.partial(byte_bpe, vocab_size, tuple(special_tokens), sys.stderr.isatty())
    content = in_child(train, corpus.pieces(), LESS_TEXT)
    corpus.check(source)
    (folder / "tokenizer.json").write_bytes(content)
    special = {"eos_token": EOS, "bos_token": BOS, "pad_token": PAD, **_further(special_tokens)}
    _write_companions(folder, special, config_for_transformers(special))


def _further(special_tokens: Sequence[str]) -> dict[str, Any]:
    return {"additional_special_tokens": list(special_tokens)} if special_tokens else {}


def _train_sentencepiece(
    corpus: _Corpus, vocab_size: int, special_tokens: Sequence[str], folder: Path, source: str
) -> None:
    lines = corpus.lines()
    first = next(lines, None)
    corpus.check(source)
    if first is None:
        raise ValueError(f"{source} holds no text to train a tokenizer on")
    train = functools.partial(sentencepiece_bpe, vocab_size, tuple(special_tokens), LINE_BYTES, source)
    content = in_child(train, itertools.chain([first], lines), LESS_TEXT)
    (folder / "tokenizer.model").write_bytes(content)
    special = {f"{name}_token": token for name, token in SENTENCEPIECE_ROLES.items()} | _further(special_tokens)
    _write_companions(folder, special, special)


def _write_companions(folder: Path, special: dict[str, Any], config: dict[str, Any]) -> None:
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
