"""Train a tokenizer on text: byte-level BPE (tokenizers) or BPE with byte fallback (sentencepiece).

Both encode every text and give it back unchanged: nothing is normalised, no space is added in front (so a word at the
very beginning of a document is not the same token as inside), and what no piece holds is written in bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lit_data.corpus.readers import OnError, ReadErrors, read_documents
from lit_data.hf_tokenizer import config_for_transformers
from lit_data.tokenizer import Tokenizer, cut, open_tokenizer

Kind = Literal["byte_bpe", "sentencepiece"]
KINDS: tuple[Kind, ...] = ("byte_bpe", "sentencepiece")

EOS, BOS, PAD, UNK = "</s>", "<s>", "<pad>", "<unk>"
BYTE_BPE_SPECIALS = (EOS, BOS, PAD)
SENTENCEPIECE_SPECIALS = (UNK, BOS, EOS, PAD)
BYTES = 256

# What BPE may join. As in the tokenizers of GPT-4 and Llama 3: English clitics, a word with the character before it,
# up to three digits, punctuation with line ends, line ends, spaces. Combining marks belong to their word.
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
TEXT_CHARACTERS = 1 << 16  # longer documents are given to the trainer in pieces; bounds its memory
LINE_CHARACTERS = 1 << 12
LINE_BYTES = 4 * (LINE_CHARACTERS + 1)


def train_tokenizer(
    paths: Sequence[str | Path],
    vocab_size: int,
    kind: Kind,
    output: str | Path,
    *,
    overwrite: bool = False,
    on_error: OnError = "stop",
    text_field: str = "text",
    errors: ReadErrors | None = None,
) -> Tokenizer:
    """Train on the documents of files and folders and write the tokenizer to the folder `output`, whole or not at all.

    Args:
        paths: what `read_documents` reads.
        vocab_size: ids in all, bytes and special tokens counted.
        kind: "byte_bpe" writes tokenizer.json, "sentencepiece" tokenizer.model, each with the files that name EOS.
        overwrite: replace an `output` that holds a tokenizer.
        on_error, text_field, errors: see `read_documents`.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: no text, a vocabulary too small or larger than the text gives, an `output` that exists.
    """
    check_arguments(vocab_size, kind, Path(output), overwrite)
    texts = (d.text for d in read_documents(paths, on_error=on_error, text_field=text_field, errors=errors))
    named = ", ".join(str(p) for p in paths)
    return train_on_texts(texts, vocab_size, kind, output, overwrite=overwrite, source=f"--input {named}")


def train_on_texts(
    texts: Iterable[str],
    vocab_size: int,
    kind: Kind,
    output: str | Path,
    *,
    overwrite: bool = False,
    source: str = "the text",
) -> Tokenizer:
    """`train_tokenizer` on texts at hand; `source` names them in errors."""
    folder = Path(output)
    check_arguments(vocab_size, kind, folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        corpus = _Corpus(texts)
        train: Callable[[_Corpus, int, Path, str], None] = (
            _train_byte_bpe if kind == "byte_bpe" else _train_sentencepiece
        )
        train(corpus, vocab_size, temporary, source)
        open_tokenizer(temporary)
        if folder.exists():
            aside = temporary.with_name(temporary.name + "-old")
            os.rename(folder, aside)
            os.rename(temporary, folder)
            shutil.rmtree(aside)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_tokenizer(folder)


def check_arguments(vocab_size: int, kind: str, output: Path, overwrite: bool) -> None:
    """What can be refused before any text is read. Raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"--type {kind}: choose {' or '.join(KINDS)}")
    specials = BYTE_BPE_SPECIALS if kind == "byte_bpe" else SENTENCEPIECE_SPECIALS
    if vocab_size <= BYTES + len(specials):
        raise ValueError(
            f"--vocab_size {vocab_size} is too small: {BYTES} bytes and {len(specials)} special tokens "
            f"({' '.join(specials)}) are always in; give {BYTES + len(specials) + 1} or more"
        )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists already; choose another folder, or replace it with --overwrite")
    if not any((output / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"--output {output} is no folder of a tokenizer: --overwrite replaces only such; remove it yourself"
        )


def _starts(text: str) -> range:
    return range(0, len(text), LINE_CHARACTERS)


class _Corpus:
    """The texts in handy pieces; keeps an error of the reader, which the trainers would turn into one of their own."""

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
        """Lines without their ends, which sentencepiece encodes as bytes; long ones in parts."""
        for piece in self.pieces():
            for line in re.split(r"[\r\n]", piece):
                parts = (p[i : i + LINE_CHARACTERS] for p in cut(line, LINE_CHARACTERS // 2) for i in _starts(p))
                yield from (part for part in parts if part and "\0" not in part)

    def check(self, source: str) -> None:
        if self.error is not None:
            raise self.error
        if not self.n_characters:
            raise ValueError(f"{source} holds no text to train a tokenizer on")


def _train_byte_bpe(corpus: _Corpus, vocab_size: int, folder: Path, source: str) -> None:
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
    backend.encode_special_tokens = True  # `</s>` in the corpus is text, here too
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BYTE_BPE_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus.pieces(), trainer)
    corpus.check(source)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise _too_large(vocab_size, source, reached)
    backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": EOS, "bos_token": BOS, "pad_token": PAD}
    _write_companions(folder, special, config_for_transformers(special))


def _train_sentencepiece(corpus: _Corpus, vocab_size: int, folder: Path, source: str) -> None:
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
            sentence_iterator=_chain(first, lines),
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
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        corpus.check(source)
        if found := re.search(r"value <= (\d+)", str(error)):
            raise _too_large(vocab_size, source, int(found.group(1))) from error
        if found := re.search(r"smaller than required_chars\D+\d+\D+(\d+)", str(error)):
            raise ValueError(
                f"--vocab_size {vocab_size} is too small: bytes, special tokens and frequent characters of {source} "
                f"take {found.group(1)}; give more"
            ) from error
        raise ValueError(f"sentencepiece can't train on {source}: {error}") from error
    corpus.check(source)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {f"{name}_token": token for name, token in _SENTENCEPIECE_ROLES.items()}
    _write_companions(folder, special, special)


_SENTENCEPIECE_ROLES = {"unk": UNK, "bos": BOS, "eos": EOS, "pad": PAD}


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _too_large(vocab_size: int, source: str, reached: int) -> ValueError:
    return ValueError(
        f"--vocab_size {vocab_size} is more than {source} gives: {reached} were reached; give fewer, or more text"
    )


def _write_companions(folder: Path, special: dict[str, str], config: dict[str, Any]) -> None:
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
