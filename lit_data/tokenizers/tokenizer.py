"""Encodes and decodes text: one interface for a Hugging Face `tokenizer.json` and a sentencepiece `.model`.

No special tokens are added, and names of special tokens in the text are encoded as ordinary text: a page about `</s>`
does not end there. `encode_parsed` gives them their ids instead, for text formatted by a chat template. BOS and EOS are
added when documents are packed.

One module, since a tokenizer reopens itself when unpickled: the base class, both kinds and `open_tokenizer` need each
other.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_data.tokenizers.cutting import (
    LIMIT_CHARACTERS,
    SPACE_MARK,
    beginning,
    cut,
    cut_samples,
    joins,
    too_long,
    without_first_spaces,
)
from lit_data.tokenizers.fingerprint import fingerprint_of_json, fingerprint_of_sentencepiece
from lit_data.tokenizers.sentencepiece_file import ModelType, PieceType, read_sentencepiece_file
from lit_data.tokenizers.unsupported import describe_foreign
from lit_files.reading import read_json

Ids = npt.NDArray[np.int32]

COMMON_EOS_TOKENS = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")
COMMON_BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")
COMMON_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]")
MAIN_FILES = ("tokenizer.json", "*.model")
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
# All files of a tokenizer besides its main file; used to copy, export and import one.
COMPANIONS = (
    *NAMING_FILES, "added_tokens.json", "vocab.json", "merges.txt", *TEMPLATE_FILES, "generation_config.json",
)  # fmt: skip

# Encoding takes a few hundred bytes per character, so this is about 20 MB at once.
PIECE_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 22

_BEFORE_NEWLINE = re.compile(r"\S\n")


class Tokenizer(ABC):
    """A tokenizer opened from a file; see `open_tokenizer`. Picklable: the copy reopens the file.

    Attributes:
        kind: "tokenizers" or "sentencepiece".
        path: the file, not its folder.
        files: the file and its companion files.
        fingerprint: SHA-256 (hex) over everything that decides the ids: vocabulary, merges or scores, normaliser,
            pre-tokenizer, added tokens. Layout and order of the file don't matter.
        vocab_size: largest id + 1, including added tokens.
        eos_id, eos_token: the end of a document.
        bos_id, pad_id: None if the tokenizer has none.
        continuation: how to encode later pieces of a long document so that the tokens equal those of the uncut text:
            "keep" the piece's leading space, "drop" it, or None if neither works.
        separators: the characters among space and newline that no token reaches across, so that the text between them
            is encoded independently; empty if this is not guaranteed. See `lit_data/tokenizers/unit_encoder.py`.

    The last two are found by encoding some thousand samples, on first use.
    """

    kind: str
    path: Path
    files: list[Path]
    vocab_size: int
    eos_id: int
    eos_token: str
    bos_id: int | None
    pad_id: int | None

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """See the class."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token name, or None."""

    @abstractmethod
    def id_to_token(self, id: int) -> str | None:
        """The token name of an id, or None."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Decode ids to text. Special tokens are shown (tokenizers) or left out (sentencepiece)."""

    @abstractmethod
    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, encoded at once."""

    @abstractmethod
    def encode_aligned(self, text: str, parse: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a text, encoded at once, and the end of each token in the text, in characters.

        `parse`: with names of special tokens as their ids; raises ValueError as `check_parses`.
        """

    @abstractmethod
    def vocabulary(self) -> Iterable[tuple[int, str]]:
        """(id, decoded text) of all learnt tokens, with literal spaces and newlines."""

    def encode(self, text: str) -> Ids:
        """Ids of a text, int32 [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, int32 [tokens]. Long texts are encoded in pieces, with the same ids.

        Raises:
            ValueError: more than LIMIT_CHARACTERS characters can't be cut.
        """
        collected: list[list[Ids]] = [[] for _ in texts]
        waiting: list[tuple[int, str]] = []
        n_characters = 0
        for number, text in enumerate(texts):
            for piece in self._pieces(text):
                waiting.append((number, piece))
                n_characters += len(piece)
                if n_characters >= BATCH_CHARACTERS:
                    self._encode_waiting(waiting, collected)
                    waiting, n_characters = [], 0
        self._encode_waiting(waiting, collected)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in collected]

    def encode_parsed(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, int32 [tokens], with names of special tokens parsed to their ids.

        A text with such a name is encoded at once.

        Raises:
            ValueError: unsupported by the tokenizer (`check_parses`), or such a text exceeds LIMIT_CHARACTERS.
        """
        self.check_parses()
        encoded = self.encode_batch(["" if self.may_hold_special(text) else text for text in texts])
        for i, text in enumerate(texts):
            if self.may_hold_special(text):
                if len(text) > LIMIT_CHARACTERS:
                    raise ValueError(
                        f"a document of {len(text)} characters with special tokens exceeds the limit of "
                        f"{LIMIT_CHARACTERS} for --special_tokens parse; split the document{beginning(text)}"
                    )
                encoded[i] = np.asarray(self.parse_plain(text), dtype=np.int32)
        return encoded

    def need_bos(self) -> int:
        """The id of BOS. Raises ValueError naming --bos if there is none."""
        if self.bos_id is None:
            raise ValueError(
                f"--bos: {self.path} has no beginning-of-sequence token: the files beside it name no bos_token it "
                f"holds, and it has none of {', '.join(COMMON_BOS_TOKENS)}; leave --bos out"
            )
        return self.bos_id

    @abstractmethod
    def check_parses(self) -> None:
        """Raises ValueError if special tokens in the text can only be encoded as text."""

    @abstractmethod
    def may_hold_special(self, text: str) -> bool:
        """False only for a text in which `encode_parsed` finds no special token."""

    @abstractmethod
    def parse_plain(self, text: str) -> list[int]:
        """Ids of a text, encoded at once, with special tokens as their ids."""

    def _encode_waiting(self, waiting: list[tuple[int, str]], collected: list[list[Ids]]) -> None:
        for (number, _), ids in zip(waiting, self.encode_plain([piece for _, piece in waiting]), strict=True):
            collected[number].append(np.asarray(ids, dtype=np.int32))

    def _pieces(self, text: str) -> list[str]:
        if len(text) <= PIECE_CHARACTERS:
            return [text]
        if self.continuation is None:
            if len(text) > LIMIT_CHARACTERS:
                raise ValueError(
                    f"a document of {len(text)} characters exceeds the limit of {LIMIT_CHARACTERS}, and with "
                    f"{self.path} it cannot be cut without changing its tokens; split the document{beginning(text)}"
                )
            return [text]
        pieces = cut(text, PIECE_CHARACTERS)
        longest = max(pieces, key=len)
        if len(longest) > LIMIT_CHARACTERS:
            raise too_long(longest)
        return self._continued(pieces)

    def _continued(self, pieces: list[str]) -> list[str]:
        return without_first_spaces(pieces) if self.continuation == "drop" else pieces

    def facts(self) -> dict[str, Any]:
        """The facts stored in a dataset's manifest."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return open_tokenizer, (self.path, self.eos_token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, vocab_size={self.vocab_size}, eos_token={self.eos_token!r})"

    def _find_specials(self, eos_token: str | None, native: dict[str, int]) -> None:
        """Set eos, bos and pad. `native` has those named in the tokenizer's own file."""
        if eos_token is not None:
            found = self.token_to_id(eos_token)
            if found is None:
                raise ValueError(f"--eos_token {eos_token}: {self.path} has no such token")
            eos_id: int | None = found
        else:
            eos_id = self._find_special("eos_token", native, COMMON_EOS_TOKENS)
        if eos_id is None:
            raise ValueError(
                f"{self.path} has no end-of-document token: the files beside it name no eos_token it holds, and it "
                f"has none of {', '.join(COMMON_EOS_TOKENS)}; name one of its tokens with --eos_token"
            )
        self.eos_id, self.eos_token = eos_id, self.id_to_token(eos_id) or ""
        self.bos_id = self._find_special("bos_token", native, COMMON_BOS_TOKENS)
        self.pad_id = self._find_special("pad_token", native, COMMON_PAD_TOKENS)

    def _find_special(self, role: str, native: dict[str, int], common: Iterable[str]) -> int | None:
        named = [_named_token(self.path.with_name(name), role) for name in NAMING_FILES]
        for token in filter(None, named):
            if (id := self.token_to_id(token)) is not None:
                return id
        if role in native:
            return native[role]
        return next((id for token in common if (id := self.token_to_id(token)) is not None), None)

    @cached_property
    def continuation(self) -> Literal["keep", "drop"] | None:
        """Found by encoding hard samples, cut at each possible position, and comparing with the uncut tokens."""
        if self._may_cross_a_cut():
            return None
        samples = cut_samples(self.added_texts())
        wholes = self.encode_plain(samples)
        kept = [cut(sample, 1) for sample in samples]
        ways: dict[Literal["keep", "drop"], list[list[str]]] = {
            "keep": kept,
            "drop": [without_first_spaces(pieces) for pieces in kept],
        }
        for way, pieces in ways.items():
            distinct = list({piece for parts in pieces for piece in parts})  # the samples share most of them
            encoded = dict(zip(distinct, self.encode_plain(distinct), strict=True))
            if [[id for piece in parts for id in encoded[piece]] for parts in pieces] == wholes:
                return way
        return None

    @cached_property
    def separators(self) -> str:
        if self._weighs_whole_texts() or self.continuation is None:
            return ""
        return " " if any(_BEFORE_NEWLINE.search(text) for _, text in self.vocabulary()) else " \n"

    @abstractmethod
    def _may_cross_a_cut(self) -> bool:
        """Whether a token could span a cut: one with a space inside, or one that absorbs the adjacent space."""

    @abstractmethod
    def _weighs_whole_texts(self) -> bool:
        """Whether scores are summed over the entire text, so that ties depend on the text before (unigram models)."""

    def added_texts(self) -> list[str]:
        """Tokens matched in the text before the model is applied."""
        return []


class JsonTokenizer(Tokenizer):
    """Wraps a `tokenizer.json` with the tokenizers library."""

    kind = "tokenizers"

    def __init__(self, path: Path, eos_token: str | None) -> None:
        self.path, self.files = path, _files_of(path)
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError(describe_foreign(path) or f"{path} is not a tokenizer.json: it has no model")
        self.content = content
        self._open_backend()
        self._find_specials(eos_token, {})
        if self._make_special({self.eos_id, self.bos_id, self.pad_id}):
            self._open_backend()
        self._byte_level = '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("normalizer")])
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def _open_backend(self) -> None:
        self.backend = self._make_backend()
        self.backend.encode_special_tokens = True

    def _make_backend(self) -> Any:
        from tokenizers import Tokenizer as Backend  # here, so that a .model needs sentencepiece only

        try:
            backend = Backend.from_str(json.dumps(self.content))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{self.path} is not a valid tokenizer.json: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        return backend

    def _make_special(self, ids: set[int | None]) -> bool:
        """Mark EOS, BOS and padding as special if the file has them as ordinary added tokens, else they would be
        matched in the text. Returns whether there were any.
        """
        found = [t for t in self.content.get("added_tokens") or [] if t["id"] in ids and not t.get("special")]
        for token in found:
            token["special"] = True
        return bool(found)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of_json(self.content)

    def token_to_id(self, token: str) -> int | None:
        id: int | None = self.backend.token_to_id(token)
        return id

    def id_to_token(self, id: int) -> str | None:
        token: str | None = self.backend.id_to_token(id)
        return token

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        text: str = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:  # without the thread pool
            return [self.backend.encode(texts[0], add_special_tokens=False).ids]
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def first_added(self) -> int | None:
        """The id that the file's post-processor prepends to a text, or None."""
        plain, whole = (self.backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        begun: bool = len(whole) > len(plain) and whole[1 : len(plain) + 1] == plain
        return int(whole[0]) if begun else None

    def check_parses(self) -> None:
        """Does nothing: parsing is supported."""

    def may_hold_special(self, text: str) -> bool:
        return self._special_names is None or self._special_names.search(text) is not None

    def parse_plain(self, text: str) -> list[int]:
        ids: list[int] = self._parsing_backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_aligned(self, text: str, parse: bool = False) -> tuple[list[int], list[int]]:
        encoding = (self._parsing_backend if parse else self.backend).encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    @cached_property
    def _special_names(self) -> re.Pattern[str] | None:
        """Pattern of special token names; None if they are matched in normalised text."""
        special = [t for t in self.backend.get_added_tokens_decoder().values() if t.special and t.content]
        if any(t.normalized for t in special) and self.content.get("normalizer") is not None:
            return None
        return re.compile("|".join(re.escape(t.content) for t in special) or r"(?!)")

    @cached_property
    def _parsing_backend(self) -> Any:
        backend = self._make_backend()
        backend.encode_special_tokens = False
        return backend

    def vocabulary(self) -> Iterable[tuple[int, str]]:
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            yield id, token.replace("Ġ", " ").replace("Ċ", "\n") if self._byte_level else _as_text(token)

    def _matched(self) -> list[Any]:
        return [t for t in self.backend.get_added_tokens_decoder().values() if not t.special]

    def added_texts(self) -> list[str]:
        return [t.content for t in self._matched()]

    def _weighs_whole_texts(self) -> bool:
        return bool(self.content["model"].get("type", "BPE") == "Unigram")

    def _may_cross_a_cut(self) -> bool:
        if any(t.lstrip or t.rstrip or t.single_word or " " in t.content for t in self._matched()):
            return True
        special = {t.content for t in self.backend.get_added_tokens_decoder().values()}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return any(joins(t, self._byte_level) for t in vocabulary if t not in special)


class SentencepieceTokenizer(Tokenizer):
    """Wraps a sentencepiece `.model`. Tokens added by other files (added_tokens.json) are ignored."""

    kind = "sentencepiece"

    def __init__(self, path: Path, eos_token: str | None) -> None:
        from sentencepiece import SentencePieceProcessor  # here, so that a tokenizer.json needs tokenizers only

        self.path, self.files = path, _files_of(path)
        self.content = read_sentencepiece_file(path)
        try:
            self.backend = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = len(self.content.pieces)
        self._ids = {piece.text: id for id, piece in enumerate(self.content.pieces)}
        ids = {f"{role}_token": int(getattr(self.backend, f"{role}_id")()) for role in ("eos", "bos", "pad")}
        self._find_specials(eos_token, {role: id for role, id in ids.items() if id >= 0})

    def _weighs_whole_texts(self) -> bool:
        return bool(self.content.model_type == ModelType.UNIGRAM)

    def _may_cross_a_cut(self) -> bool:
        learned = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
        # Unigram scores are summed in float32 over the entire text: earlier rounding decides between segmentations of
        # equal score, so cutting anywhere can change the tokens.
        return (
            self._weighs_whole_texts()
            or self.content.treat_whitespace_as_suffix
            or any(joins(p.text) for p in self.content.pieces if p.type in learned)
        )

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of_sentencepiece(self.content)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, id: int) -> str | None:
        return self.content.pieces[id].text if 0 <= id < self.vocab_size else None

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        text: str = self.backend.decode([int(i) for i in ids])
        return text

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        return [self.backend.encode(text, out_type=int) for text in texts]

    def check_parses(self) -> None:
        raise ValueError(
            f"--special_tokens parse: {self.path} is a sentencepiece model, which encodes the names of control tokens "
            "as text; give a tokenizer.json (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW) makes one)"
        )

    def may_hold_special(self, text: str) -> bool:
        names = (p.text for p in self.content.pieces if p.type in (PieceType.CONTROL, PieceType.UNKNOWN))
        return any(name in text for name in names)

    def parse_plain(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_aligned(self, text: str, parse: bool = False) -> tuple[list[int], list[int]]:
        if parse:
            self.check_parses()
        ids = self.encode_plain([text])[0]
        pieces = self.backend.encode(text, out_type=str)
        # The library's own offsets are in bytes or characters, depending on its version.
        added = bool(pieces) and pieces[0].startswith(SPACE_MARK) and not text.startswith(" ")
        ends, end = [], -added
        for id, piece in zip(ids, pieces, strict=True):
            if self.content.pieces[id].type == PieceType.BYTE:
                end += int(piece[1:-1], 16) & 0xC0 != 0x80  # a character counts with its first byte
            else:
                end += len(piece)
            ends.append(end)
        return ids, ends

    def vocabulary(self) -> Iterable[tuple[int, str]]:
        return ((id, _as_text(piece.text)) for id, piece in enumerate(self.content.pieces))

    def added_texts(self) -> list[str]:
        return [p.text.replace(SPACE_MARK, " ") for p in self.content.pieces if p.type == PieceType.USER_DEFINED]


def open_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Open a tokenizer: a folder (`tokenizer.json` is preferred to `*.model`) or a file.

    EOS is `eos_token`, else what tokenizer_config.json or special_tokens_map.json beside it names, else the
    sentencepiece model's own, else one of COMMON_EOS_TOKENS.

    Raises:
        FileNotFoundError: no such path, or a folder without a tokenizer.
        ValueError: not a tokenizer, or one without EOS.
    """
    file = _find_file(Path(path))
    if file.suffix == ".json":
        return JsonTokenizer(file, eos_token)
    if (foreign := describe_foreign(file)) is not None:
        raise ValueError(foreign)
    if file.suffix == ".model":
        return SentencepieceTokenizer(file, eos_token)
    raise ValueError(f"{file} is not a tokenizer: give a tokenizer.json, a .model of sentencepiece, or their folder")


def _as_text(token: str) -> str:
    """The text of a token, for vocabularies that write spaces as SPACE_MARK and bytes as <0x0A>."""
    return {"<0x0A>": "\n", "<0x20>": " "}.get(token) or token.replace(SPACE_MARK, " ")


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or folder")
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    models = sorted(path.glob("*.model"))
    if len(models) > 1 and path / "tokenizer.model" not in models:
        raise ValueError(f"{path} holds several .model files; name one of {', '.join(str(m) for m in models)}")
    if not models and (foreign := describe_foreign(path)) is not None:
        raise ValueError(foreign)
    if not models:
        raise FileNotFoundError(f"no tokenizer in {path}: it holds neither tokenizer.json nor a .model file")
    return path / "tokenizer.model" if path / "tokenizer.model" in models else models[0]


def _files_of(path: Path) -> list[Path]:
    return [path, *companions_in(path.parent)]


def companions_in(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder, except its main file."""
    return [file for pattern in COMPANIONS for file in sorted(folder.glob(pattern)) if file.is_file()]


def _named_token(path: Path, role: str) -> str | None:
    """The token that a companion file names for a role."""
    content = read_json(path) if path.is_file() else None
    return name_of_token(content.get(role)) if isinstance(content, dict) else None


def name_of_token(value: Any) -> str | None:
    """The name of a token in a JSON file, as a string or {"content": ...}; None for anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
