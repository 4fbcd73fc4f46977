"""Encoding by units gives the tokenizer's own ids of the whole text."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lit_data.tokenizers import unit_encoder as module
from lit_data.tokenizers.cutting import SAFE
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_data.tokenizers.training import train_on_texts
from lit_data.tokenizers.unit_encoder import UnitEncoder, unit_patterns

TEXTS = [
    "Der Hund läuft über die Straße, und die Katze (sie heißt Mia) schläft 24 Stunden am Tag.\n  Ende  gut!\n\n" * 4,
    "§ 12 Absatz 3\n(1) Es war einmal ein König,\nder hatte „drei“ Töchter – und 1250 Schafe.\n* a\n* b\n" * 4,
]


def metaspace(path: Path, split: bool, newline: bool) -> Path:
    """As converted from sentencepiece: the whole text is one word, or words are split; newlines may be tokens."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bpe.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    lines = [line for text in TEXTS for line in (text.split("\n") if newline else [text])]
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    if newline:
        bpe.add_tokens(["\n"])
    content = json.loads(bpe.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    path.write_text(json.dumps(content))
    return path


def word_piece(path: Path) -> Path:
    """Lower case, accents stripped, punctuation separate: spaces are not retained."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "</s>"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.save(str(path))
    return path


KINDS = ("byte_bpe", "sentencepiece", "metaspace whole", "metaspace split", "nmt_nfkc", "word pieces")


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS[:2]:
        train_on_texts(TEXTS, 340, kind, folder / kind)
    metaspace(folder / "whole.json", split=False, newline=True)
    metaspace(folder / "split.json", split=True, newline=False)
    word_piece(folder / "pieces.json")
    with open(folder / "nfkc.model", "wb") as model:
        lines = iter([line for text in TEXTS for line in text.split("\n") if line])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, minloglevel=2, num_threads=1, model_type="bpe", vocab_size=120
        )
    names = (*KINDS[:2], "whole.json", "split.json", "nfkc.model", "pieces.json")
    return {kind: open_tokenizer(folder / name) for kind, name in zip(KINDS, names, strict=True)}


def assert_same(tokenizer: Tokenizer, encoder: UnitEncoder, texts: list[str]) -> None:
    ids, lengths = encoder.encode(texts)
    expected = tokenizer.encode_plain(texts)
    assert lengths.tolist() == [len(e) + 1 for e in expected]
    assert ids.tolist() == [id for e in expected for id in [*e, tokenizer.eos_id]]


def test_these_tokenizers_are_encoded_by_units(opened):
    by_units = {kind: UnitEncoder(tokenizer, np.int32).by_units for kind, tokenizer in opened.items()}
    # WordPiece has no token that starts with a space, so there is no separator to put between units.
    assert by_units == dict.fromkeys(KINDS, True) | {"word pieces": False}
    assert opened["metaspace whole"].separators == " \n"


PIECES = st.sampled_from(
    ["der", "Hund", "Straße", " ", "  ", "\n", "\n\n", "\t", ".", "„", "“", "–", "§", "12", "a", "</s>", "▁", "\u00a0",
     "\u0301", "\u200b", "日本", "😀", "ﬁ", "\x00", "\r\n", "\u037a", "'s", "don't"]
)  # fmt: skip
TEXT = st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text(max_size=30))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_texts(opened, kind):
    """No text at all, and texts that give no token."""
    encoder = UnitEncoder(opened[kind], np.uint16)
    ids, lengths = encoder.encode([])
    assert ids.dtype == np.uint16 and len(ids) == len(lengths) == 0
    assert_same(opened[kind], encoder, ["", ""])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_ids_equal_those_of_the_whole_text(opened, kind, texts):
    if not hasattr(opened[kind], "encoder"):
        opened[kind].encoder = UnitEncoder(opened[kind], np.int32)  # type: ignore[attr-defined]
    assert_same(opened[kind], opened[kind].encoder, texts)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS[:5])
def test_a_small_cache_gives_the_same_ids(opened, kind, monkeypatch):
    """Units are evicted all the time, long texts are split, groups are tiny, and the separator occurs in the text."""
    monkeypatch.setattr(module, "SLICE_CHARACTERS", 40)
    monkeypatch.setattr(module, "GROUP_CHARACTERS", 16)
    monkeypatch.setattr(module, "LONG_UNIT", 5)
    encoder = UnitEncoder(opened[kind], np.uint16, max_units=7)
    assert encoder.by_units
    assert_same(opened[kind], encoder, [*TEXTS, TEXTS[0] + encoder._fence * 3 + TEXTS[1], "", " "])
    assert len(encoder._units) < 100


def test_a_stretch_without_a_split_point_is_refused(opened, monkeypatch):
    monkeypatch.setattr(module, "LIMIT_CHARACTERS", 50)
    encoder = UnitEncoder(opened["byte_bpe"], np.uint16)
    encoder.encode(["ab " * 100])
    with pytest.raises(ValueError, match="has 60 characters in a row"):
        encoder.encode(["ein " + "x" * 59])


def test_units_concatenate_to_the_text():
    all_units, _ = unit_patterns(" \n")
    text = " a  b\n\nc\u0301 d – „e“ ͺ f\n"
    units = all_units.findall(text)
    assert "".join(units) == text and units[-1] == ""
    assert units == [" a", "  b", "\n\nc\u0301 d", " –", " „e“", " ͺ f", "\n", ""]


def test_no_safe_character_contains_a_space():
    """The list of letters that contain a space once normalised is complete."""
    safe = re.compile(SAFE)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if " " in unicodedata.normalize("NFKC", character) or character.isspace():
            assert not safe.fullmatch(character), hex(code)
