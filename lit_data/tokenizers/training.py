"""Trains a tokenizer on text: byte-level BPE (tokenizers) or BPE with byte fallback (sentencepiece).

Both are lossless for every text: no normalisation, no dummy prefix space (so a word at the start of a document is
another token than inside), and byte fallback for characters without a piece.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_data.corpus.cleaners import Cleaner, open_cleaner
from lit_data.corpus.files import ReadErrors, TextFile, list_files, mixed_split_names, sizes_of, train_and_held_out
from lit_data.corpus.readers import read_documents
from lit_data.corpus.separators import check_separator
from lit_data.tokenizers.cutting import cut
from lit_data.tokenizers.hf_export import config_for_transformers
from lit_data.tokenizers.settings import Kind, TokenizerSettings
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_files.progress import TaskProgress
from lit_files.publish import build_folder

EOS, BOS, PAD, UNK = "</s>", "<s>", "<pad>", "<unk>"
BYTE_BPE_SPECIALS = (EOS, BOS, PAD)
SENTENCEPIECE_SPECIALS = (UNK, BOS, EOS, PAD)
BYTES = 256
MAX_VOCAB_SIZE = 10_000_000  # trainers preallocate it; ten times the largest vocabulary in use

# Units within which BPE may merge. As in the tokenizers of GPT-4 and Llama 3: English clitics, a word with the
# character before it, up to three digits, punctuation with line ends, line ends, spaces. Combining marks belong to
# their word.
WORDS = "|".join(
    (
        r"'(?i:s|t|m|d|ll|re|ve)(?![\p{L}\p{M}])",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
TEXT_CHARACTERS = 1 << 16  # longer documents are split for the trainer; bounds its memory
LINE_CHARACTERS = 1 << 12
LINE_BYTES = 4 * (LINE_CHARACTERS + 1)


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
    """Iterates over the texts in pieces; keeps an error of the reader, which trainers would replace by their own."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.n_characters = texts, 0
        self.error: Exception | None = None

    def pieces(self) -> Iterator[str]:
        try:
            for text in self.texts:
                self.n_characters += len(text.strip())
                yield from cut(text, TEXT_CHARACTERS)
        except Exception as error:
            self.error = error

    def lines(self) -> Iterator[str]:
        """Lines without line ends, which sentencepiece encodes as bytes; long ones split."""
        for piece in self.pieces():
            for line in re.split(r"[\r\n]", piece):
                parts = (p[i : i + LINE_CHARACTERS] for p in cut(line, LINE_CHARACTERS // 2) for i in _starts(p))
                yield from (part for part in parts if part and "\0" not in part)

    def check(self, source: str) -> None:
        if self.error is not None:
            raise self.error
        if not self.n_characters:
            raise ValueError(f"{source} holds no text to train a tokenizer on")


def _train_byte_bpe(corpus: _Corpus, vocab_size: int, special_tokens: Sequence[str], folder: Path, source: str) -> None:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.encode_special_tokens = True  # `</s>` in the corpus is ordinary text here too
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BYTE_BPE_SPECIALS, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(corpus.pieces(), trainer)
    corpus.check(source)
    backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": EOS, "bos_token": BOS, "pad_token": PAD, **_further(special_tokens)}
    _write_companions(folder, special, config_for_transformers(special))


def _further(special_tokens: Sequence[str]) -> dict[str, Any]:
    return {"additional_special_tokens": list(special_tokens)} if special_tokens else {}


def _train_sentencepiece(
    corpus: _Corpus, vocab_size: int, special_tokens: Sequence[str], folder: Path, source: str
) -> None:
    import sentencepiece

    lines = corpus.lines()
    first = next(lines, None)
    corpus.check(source)
    if first is None:
        raise ValueError(f"{source} holds no text to train a tokenizer on")
    model = io.BytesIO()
    settings: dict[str, Any] = {
        f"{name}_id": SENTENCEPIECE_SPECIALS.index(t) for name, t in _SENTENCEPIECE_ROLES.items()
    }
    settings |= {f"{name}_piece": token for name, token in _SENTENCEPIECE_ROLES.items()}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=LINE_BYTES,
            hard_vocab_limit=False,  # fewer ids if the text does not support more
            control_symbols=list(special_tokens),
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        corpus.check(source)
        if found := re.search(r"smaller than required_chars\D+\d+\D+(\d+)", str(error)):
            raise ValueError(
                f"--vocab_size {vocab_size} is too small: bytes, special tokens and frequent characters of {source} "
                f"take {found.group(1)}; give more"
            ) from error
        raise ValueError(f"sentencepiece can't train on {source}: {error}") from error
    corpus.check(source)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {f"{name}_token": token for name, token in _SENTENCEPIECE_ROLES.items()} | _further(special_tokens)
    _write_companions(folder, special, special)


_SENTENCEPIECE_ROLES = {"unk": UNK, "bos": BOS, "eos": EOS, "pad": PAD}


def _write_companions(folder: Path, special: dict[str, Any], config: dict[str, Any]) -> None:
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
