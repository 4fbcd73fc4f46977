"""Exports a tokenizer as files for transformers that give the same ids as preparation.

`AutoTokenizer.from_pretrained(folder)(text)["input_ids"]` equals `Tokenizer.encode(text)` for a text without names of
special tokens, with BOS in front if the training documents had one. Names of special tokens become their ids, as in the
source tokenizer and as chat templates need it. The class is the generic one, since model-specific classes rebuild
normaliser and pre-tokenizer in their own way. Chat templates are copied.

The BOS token is declared if the training data had it or a chat template prints it. Otherwise it is left out, so that
evaluations that prepend any declared BOS don't start with a token unseen in training.

A sentencepiece model becomes a tokenizer.json. Its processing is expressed with components of the tokenizers library
and tested on hard strings and on its own pieces; any difference is an error. One known difference is not tested: the
library applies a character map (nmt_nfkc and similar) per grapheme, sentencepiece by longest match, so unusual
sequences of combining marks may differ. Another affects Unigram models: between segmentations of equal score (`**` `*`
and `*` `**`), rounding of sentencepiece's float32 sums over the preceding text decides, which the library's float64
sums can't reproduce. For identical ids everywhere, prepare the data with the converted folder instead of the .model.
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_data.tokenizers.cutting import SPACE_MARK
from lit_data.tokenizers.sentencepiece_file import ModelType, Piece, PieceType, SentencepieceFile
from lit_data.tokenizers.tokenizer import (
    NAMING_FILES,
    TEMPLATE_FILES,
    JsonTokenizer,
    SentencepieceTokenizer,
    Tokenizer,
    name_of_token,
    open_tokenizer,
)
from lit_files.publish import write_text
from lit_files.reading import read_foreign_object, read_text

KEPT_SETTINGS = ("model_max_length", "chat_template", "padding_side", "truncation_side", "model_input_names")
STAND_INS = 0xF0000  # a private use area
UNREACHABLE_SCORE = -1000.0  # far below the score of any text as long as a control token's name

HARD_STRINGS = (
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  zwei  Leerzeichen   drei ",
    "Ein Satz über Bäume, Straßen und Öl; „Zitat“ – 12,5 % (S. 3 ff.) …",
    "\n",
    "\n\n a\n  b\r\nc\td\t\te\n",
    " \n \n",
    "</s>",
    "<s>Text</s> <unk><pad> <|endoftext|>",
    "a</s>b <s> c",
    "<0x41> <0x0A><0xFF>",
    "▁",
    "▁a▁▁b ▁ c▁",
    "Ġ Ċ",
    "$x_1^2$ {a} \\frac `code` ~ <b> # @ & * = + | ; : ! ? \" '",
    "https://example.org/a?b=c&d=%20#e",
    "def f(x):\n    return x ** 2\n",
    "1 12 123 1234 12345 1.000.000,50 2024-12-31 III",
    "ÄÖÜäöüßẞ éèêç ñ ø å Œ",
    "A\u0308 o\u0308 u\u0308 e\u0301 n\u0303 (zerlegt), u\u0308\u0301 e\u0302\u0301",
    "ﬁ ﬂ ½ ² ³ ™ № ℃ Ａ１ ～",
    "soft\u00adhyphen no\u00a0break zero\u200bwidth \ufeffbom thin\u2009space",
    "日本語 中文字符 한국어 ภาษาไทย हिन्दी العربية עברית русский ελληνικά",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "😀 👍🏽 👨‍👩‍👧 🇩🇪 \U0001d54f",
    "\x01\x02 \x7f",
    "aaaaaaaaaaaaaaaaaaaaaaa bbbbbbb ababababab --------- ........",
    "ununununun enenenen ererererer derderder",
    "I'm don't we'll they've HE'S",
    "ein\u3000Abstand\u2028Zeile",
)


def write_hf_tokenizer(source: str | Path | Tokenizer, output_dir: str | Path, *, bos: bool = False) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, and copy chat templates.

    Args:
        source: an opened tokenizer, or a path for `open_tokenizer`.
        output_dir: created if needed; existing files of these names are replaced.
        bos: whether the training documents started with BOS, so texts do too.

    Raises:
        ValueError: the sentencepiece model can't be expressed, or the result differs on a string.
    """
    tokenizer = source if isinstance(source, Tokenizer) else open_tokenizer(source)
    for content in _candidates(tokenizer):
        if _first_difference(tokenizer, content, HARD_STRINGS) is None:
            break
    texts = [*HARD_STRINGS, *_own_strings(tokenizer)]
    different = _first_difference(tokenizer, content, texts)
    if different is not None:
        raise ValueError(
            f"{tokenizer.path} can't be written for transformers: the conversion gives other ids for {different!r}; "
            "prepare the data with a tokenizer.json instead"
        )
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    special = _special_tokens(tokenizer, content, bos)
    _write(output / "tokenizer.json", {**content, "post_processor": _bos_processor(tokenizer) if bos else None})
    _write(output / "special_tokens_map.json", special)
    config = {**_kept_settings(tokenizer), **config_for_transformers(special, bos)}
    _write(output / "tokenizer_config.json", config)
    for file in _template_files(tokenizer):
        target = output / file.relative_to(tokenizer.path.parent)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())


def declared_bos(tokenizer: Tokenizer, bos: bool) -> int | None:
    """The id of the BOS token to declare, see the module. `bos`: whether the training data had it."""
    return tokenizer.bos_id if bos or prints_bos(tokenizer) else None


def prints_bos(tokenizer: Tokenizer) -> bool:
    """Whether a chat template of the tokenizer prints its BOS token, as `bos_token` or by its name."""
    if tokenizer.bos_id is None or _settings(tokenizer).get("bos_token", "") is None:
        return False
    name = tokenizer.id_to_token(tokenizer.bos_id) or ""
    sources = (re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL) for text in chat_templates(tokenizer).values())
    return any(name in text or re.search(r"\bbos_token\b", text) for text in sources)


def chat_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """The chat templates beside a tokenizer, by name; "default" is used unless another is named."""
    found: dict[str, str] = {}
    kept = _settings(tokenizer).get("chat_template")
    if isinstance(kept, str):
        found["default"] = kept
    elif isinstance(kept, list):
        found |= {
            str(t["name"]): str(t["template"]) for t in kept if isinstance(t, dict) and {"name", "template"} <= t.keys()
        }
    for file in _template_files(tokenizer):
        text = read_foreign_object(file).get("chat_template") if file.suffix == ".json" else read_text(file)
        if isinstance(text, str):
            found["default" if file.stem == "chat_template" else file.stem] = text
    return found


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers puts BOS before a text, according to the tokenizer's files."""
    if tokenizer.bos_id is None:
        return False
    if isinstance(asked := _settings(tokenizer).get("add_bos_token"), bool):
        return asked
    if not isinstance(tokenizer, JsonTokenizer):
        return False
    return tokenizer.first_added() == tokenizer.bos_id


def names_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a `bos_token` for transformers, according to its files, added to texts or not."""
    return tokenizer.bos_id is not None and name_of_token(_settings(tokenizer).get("bos_token")) is not None


def parses_special_tokens(tokenizer: Tokenizer) -> bool:
    """Whether transformers parses special tokens named in a text to their ids, according to the tokenizer's files."""
    return isinstance(tokenizer, JsonTokenizer) and not _settings(tokenizer).get("split_special_tokens", False)


def _candidates(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Candidates for tokenizer.json; the first that agrees on the hard strings is used."""
    if isinstance(tokenizer, JsonTokenizer):
        yield {**tokenizer.content, "post_processor": None, "truncation": None, "padding": None}
        return
    assert isinstance(tokenizer, SentencepieceTokenizer)
    _check_convertible(tokenizer)
    has_map = bool(tokenizer.content.precompiled_charsmap)
    # Composing first helps if marks follow a letter that the map also changes, but alters some rare texts.
    for compose in (False, True)[: 1 + has_map]:
        for split_crlf in (False, True)[: 1 + has_map]:
            yield _from_sentencepiece(tokenizer.content, compose, split_crlf)


def _check_convertible(tokenizer: SentencepieceTokenizer) -> None:
    content = tokenizer.content
    problem = None
    if content.model_type not in (ModelType.BPE, ModelType.UNIGRAM):
        problem = f"its model is of type {content.model_type.name}"
    elif content.treat_whitespace_as_suffix:
        problem = "it writes spaces as suffixes"
    elif not content.escape_whitespaces:
        problem = "it does not escape spaces"
    elif any(piece.type == PieceType.UNUSED for piece in content.pieces):
        problem = "it has pieces marked as unused"
    if problem:
        raise ValueError(
            f"{tokenizer.path} can't be written for transformers: {problem}; only BPE and Unigram models can"
        )


def _from_sentencepiece(content: SentencepieceFile, compose: bool, split_crlf: bool) -> dict[str, Any]:
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    added = [
        {"id": id, "content": p.text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for id, p in enumerate(content.pieces)
        if p.type in special
    ]
    is_bpe = content.model_type == ModelType.BPE
    model = _bpe(content) if is_bpe else _unigram(content)
    splits = [_user_defined_split(content.pieces)]
    if not is_bpe or model["ignore_merges"]:  # these look up complete names
        splits.append(_reserved_split(content))
    decoders: list[dict[str, Any]] = [
        _replace(SPACE_MARK, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if content.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(content, compose, split_crlf))},
        "pre_tokenizer": _sequence("pretokenizers", [s for s in splits if s is not None]),
        "post_processor": None,
        "decoder": _sequence("decoders", decoders),
        "model": model,
    }


def _sequence(key: str, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", key: parts} if parts else None


def _normalizers(content: SentencepieceFile, compose: bool, split_crlf: bool) -> Iterator[dict[str, Any]]:
    """sentencepiece's normalizer.cc: map characters, drop extra spaces, add the dummy prefix, write spaces as ▁."""
    if content.precompiled_charsmap:
        # User-defined symbols are not mapped: private-use characters stand in for them.
        symbols = _user_defined(content.pieces)
        stand_ins = [(symbol, chr(STAND_INS + i)) for i, symbol in enumerate(symbols)]
        yield from (_replace(symbol, stand_in) for symbol, stand_in in stand_ins)
        if compose:
            yield {"type": "NFC"}
        if split_crlf:  # one grapheme, which would become one space; \r and \n each become one
            yield _replace("\r\n", "\n\n")
        charsmap = base64.b64encode(content.precompiled_charsmap).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
        yield from (_replace(stand_in, symbol) for symbol, stand_in in stand_ins)
    if content.remove_extra_whitespaces:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if content.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE_MARK}
    yield _replace(" ", SPACE_MARK)
    if content.remove_extra_whitespaces:  # a ▁ in the text is removed too
        yield {"type": "Replace", "pattern": {"Regex": rf"{SPACE_MARK}+\z"}, "content": ""}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _user_defined(pieces: Sequence[Piece]) -> list[str]:
    return sorted((p.text for p in pieces if p.type == PieceType.USER_DEFINED), key=len, reverse=True)


def _user_defined_split(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    """Split off user-defined symbols: matched first, longest at each position, and never part of another token."""
    symbols = _user_defined(pieces)
    if not symbols:
        return None
    return _split("|".join(re.escape(s) for s in symbols), "Isolated")


def _reserved_split(content: SentencepieceFile) -> dict[str, Any] | None:
    """A name such as `</s>` in the text must not be found as a token: the text is cut inside it, between a character in
    some piece and one in none, which has no other effect. Names without such a position need no cut in Unigram models,
    thanks to their low score.
    """
    known = {c for p in content.pieces if p.type == PieceType.NORMAL for c in p.text}
    patterns = []
    for piece in content.pieces:
        name = piece.text
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.BYTE):
            cuts = [i for i in range(1, len(name)) if (name[i - 1] in known) != (name[i] in known)]
            if len(name) > 1 and content.byte_fallback and not known & set(name):
                cuts = [1]  # bytes are never merged, unlike unknown characters
            patterns += [f"{re.escape(name[:i])}(?={re.escape(name[i:])})" for i in cuts[:1]]
    return _split("|".join(patterns), "MergedWithPrevious") if patterns else None


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _unknown(pieces: Sequence[Piece]) -> int:
    return next(id for id, piece in enumerate(pieces) if piece.type == PieceType.UNKNOWN)


def _bpe(content: SentencepieceFile) -> dict[str, Any]:
    pieces = content.pieces
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[_unknown(pieces)].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": content.byte_fallback,
        # A symbol of several characters has no merges: it is matched as a unit.
        "ignore_merges": any(len(symbol) > 1 for symbol in _user_defined(pieces)),
        "vocab": {piece.text: id for id, piece in enumerate(pieces)},
        "merges": _merges(pieces),
    }


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first: sentencepiece merges by the score of the result."""
    ids = {piece.text: id for id, piece in enumerate(pieces) if piece.type == PieceType.NORMAL}
    merges = []
    for text, id in ids.items():
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in ids and right in ids:
                merges.append((-pieces[id].score, id, ids[left], ids[right]))
    merges.sort()
    return [[pieces[left].text, pieces[right].text] for _, _, left, right in merges]


def _unigram(content: SentencepieceFile) -> dict[str, Any]:
    scores = {PieceType.NORMAL: None, PieceType.USER_DEFINED: 0.0}
    vocab = [[p.text, p.score if (s := scores.get(p.type, UNREACHABLE_SCORE)) is None else s] for p in content.pieces]
    return {
        "type": "Unigram",
        "unk_id": _unknown(content.pieces),
        "vocab": vocab,
        "byte_fallback": content.byte_fallback,
    }


def _first_difference(tokenizer: Tokenizer, content: dict[str, Any], texts: Sequence[str]) -> str | None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), encoded, strict=True):
        if ours.tolist() != theirs.ids:
            return text
    return None


def _own_strings(tokenizer: Tokenizer) -> list[str]:
    """Texts from a sentencepiece model's own pieces: each alone, and repeated and mixed at random (fixed seed)."""
    if not isinstance(tokenizer, SentencepieceTokenizer):
        return []
    own = [piece.text.replace(SPACE_MARK, " ") for piece in tokenizer.content.pieces]
    symbols = _user_defined(tokenizer.content.pieces)
    generator = random.Random(0)
    mixed = ["".join(generator.choices(own, k=generator.randint(2, 40))) for _ in range(2000)]
    repeated = [generator.choice(own) * generator.randint(2, 9) for _ in range(2000)]
    with_symbols = [f"{s}{own[i % len(own)]}{s}" for i in range(300) for s in symbols[:20]]
    return [*own, *mixed, *repeated, *with_symbols]


def _bos_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """A post-processor that puts BOS before a text, and before each of a pair."""
    id = tokenizer.need_bos()
    name = tokenizer.id_to_token(id)

    def with_bos(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": name, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": with_bos("A", 0),
        "pair": [*with_bos("A", 0), *with_bos("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }


def _special_tokens(tokenizer: Tokenizer, content: dict[str, Any], bos: bool) -> dict[str, str]:
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    ids = {"eos_token": tokenizer.eos_id, "bos_token": declared_bos(tokenizer, bos), "pad_token": pad_id}
    for role in ("sep_token", "cls_token", "mask_token"):
        named = name_of_token(_settings(tokenizer).get(role))
        ids[role] = tokenizer.token_to_id(named) if named is not None else None
    special = {role: token for role, id in ids.items() if id is not None and (token := tokenizer.id_to_token(id))}
    unknown = content["model"].get("unk_token")
    if content["model"].get("unk_id") is not None:
        unknown = content["model"]["vocab"][content["model"]["unk_id"]][0]
    return special | ({"unk_token": unknown} if unknown and tokenizer.token_to_id(unknown) is not None else {})


def config_for_transformers(special: Mapping[str, Any], bos: bool = False) -> dict[str, Any]:
    """Build tokenizer_config.json, with special tokens by role (`eos_token` and so on)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Read the tokenizer_config.json beside a tokenizer; empty if there is none."""
    path = tokenizer.path.with_name(NAMING_FILES[0])
    return read_foreign_object(path) if path.is_file() else {}


def _kept_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    settings = _settings(tokenizer)
    kept = {key: settings[key] for key in KEPT_SETTINGS if settings.get(key) is not None}

    def known(token: Any) -> bool:
        # A token missing from the vocabulary would get an id beyond the model's.
        return (name := name_of_token(token)) is not None and tokenizer.token_to_id(name) is not None

    # transformers 5 calls the list extra_special_tokens and reads both; 4 expects a dict under that key.
    extra = settings.get("extra_special_tokens") or {}
    named = {k: name_of_token(t) for k, t in extra.items() if known(t)} if isinstance(extra, dict) else {}
    listed = settings.get("additional_special_tokens") or (extra if isinstance(extra, list) else [])
    more = {"additional_special_tokens": [name_of_token(t) for t in listed if known(t)], "extra_special_tokens": named}
    return kept | {key: value for key, value in more.items() if value}


def _template_files(tokenizer: Tokenizer) -> list[Path]:
    folder = tokenizer.path.parent
    return [file for pattern in TEMPLATE_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
