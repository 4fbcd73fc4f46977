"""The tokenizer interface: special tokens as text, long documents in pieces, fingerprints of content."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lit_data.tokenizers import tokenizer as module
from lit_data.tokenizers.cutting import cut
from lit_data.tokenizers.sentencepiece_file import ModelType, PieceType, read_sentencepiece_file
from lit_data.tokenizers.settings import TokenizerSettings
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_data.tokenizers.training import train_on_texts, train_tokenizer

TEXT = (
    "Der Hund läuft über die Straße, und die Katze (sie heißt Mia) schläft 24 Stunden am Tag.\n  Ende  gut, alles gut! "
)
TEXTS = [TEXT * 5, "Es war einmal ein König, der hatte 3 Töchter und 1250 Schafe. " * 5]
KINDS = ("byte_bpe", "sentencepiece")


def train_sentencepiece(path: Path, more: Sequence[str] = (), **settings: object) -> Path:
    model = io.BytesIO()
    lines = [line for text in [*TEXTS, *more] for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=model, minloglevel=2, num_threads=1, **settings
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Trained tokenizers of both kinds: folder/byte_bpe and folder/sentencepiece."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        train_on_texts(TEXTS, 340, kind, folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_text_are_text(folder, kind):
    opened = open_tokenizer(folder / kind)
    text = "a</s>b <s> <pad><unk> </s>"
    ids = opened.encode(text)
    assert ids.dtype == np.int32
    assert not {opened.eos_id, opened.bos_id, opened.pad_id} & set(ids.tolist())
    assert opened.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " ", "a", TEXT, "日本\n\t\u0301 😀 \x01", "  x  ", "▁▁ a"])
def test_decoding_gives_the_text_back(folder, kind, text):
    opened = open_tokenizer(folder / kind)
    if kind == "sentencepiece":
        text = text.replace("▁", "_")  # its representation of spaces
    assert opened.decode(opened.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_changes_nothing(folder, kind):
    opened = open_tokenizer(str(folder / kind))
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.facts() == opened.facts() and copy.encode(TEXT).tolist() == opened.encode(TEXT).tolist()
    assert set(opened.facts()) == {"kind", "fingerprint", "vocab_size", "eos_id", "bos_id"}
    assert [f.name for f in opened.files][1:] == ["tokenizer_config.json", "special_tokens_map.json"]


def sentencepiece_settings() -> list[dict[str, object]]:
    return [
        {"model_type": "bpe", "vocab_size": 150},  # nmt_nfkc, dummy prefix, extra spaces removed
        {"model_type": "bpe", "vocab_size": 150, "remove_extra_whitespaces": False},
        {"model_type": "bpe", "vocab_size": 150, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    ]


@pytest.mark.parametrize("settings", sentencepiece_settings())
def test_pieces_of_a_long_document_give_the_tokens_of_the_whole_document(tmp_path, monkeypatch, settings):
    opened = open_tokenizer(train_sentencepiece(tmp_path / "m.model", **settings))
    check_pieces(opened, monkeypatch)
    if settings.get("remove_extra_whitespaces") is False and settings.get("add_dummy_prefix", True):
        assert opened.continuation == "drop"  # otherwise the dummy prefix would be added to the space


def test_unigram_models_encode_whole_documents(tmp_path, monkeypatch):
    """Among segmentations of equal score, float32 rounding decides, and so the preceding text."""
    draw = random.Random(0)
    words = ["".join(draw.choices("ab*", weights=(3, 2, 2), k=draw.randint(1, 9))) for _ in range(6000)]
    more = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    settings = {"model_type": "unigram", "hard_vocab_limit": False, "vocab_size": 100}
    opened = open_tokenizer(train_sentencepiece(tmp_path / "m.model", more, **settings))
    text = " ".join(words)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1000)
    assert opened.encode(text).tolist() == opened.encode_plain([text])[0]
    assert opened.continuation is None


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_long_document_for_the_trained_kinds(folder, monkeypatch, kind):
    check_pieces(open_tokenizer(folder / kind), monkeypatch)


def check_pieces(opened: Tokenizer, monkeypatch) -> None:
    texts = ["", *TEXTS, TEXT, " führt  ein </s> Wort", "a \u0301b c ͺd e"]
    assert opened.continuation in ("keep", "drop")
    whole = [ids.tolist() for ids in opened.encode_batch(texts)]
    assert whole == opened.encode_plain(texts)
    for size in (1, 7, 50):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", size)
        monkeypatch.setattr(module, "BATCH_CHARACTERS", 2 * size)
        assert len(opened._pieces(TEXTS[0])) > 3
        assert [ids.tolist() for ids in opened.encode_batch(texts)] == whole


def test_cuts_are_before_single_spaces_between_words():
    assert cut("ab cd  ef\n gh, (ij) kl", 1) == ["ab", " cd  ef\n gh,", " (ij)", " kl"]
    assert cut("a b c d", 3) == ["a b", " c d"]
    assert cut("a ▁b \u0301c ͺd", 1) == ["a ▁b \u0301c ͺd"]  # a combining mark; a letter that NFKC begins with a space


def bare_bpe(folder: Path, vocabulary: list[str], merges: list[tuple[str, str]], **changes: object) -> Path:
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(backend.to_str()) | changes))
    return folder


def test_a_token_across_a_space_prevents_splitting(tmp_path, monkeypatch):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, "</s>", "bĠ", "bĠc"]
    opened = open_tokenizer(bare_bpe(tmp_path / "a", vocabulary, [("b", "Ġ"), ("bĠ", "c")]))
    assert opened.continuation is None
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 4)
    assert opened.encode("ab cd ab cd").tolist() == opened.encode_plain(["ab cd ab cd"])[0]
    monkeypatch.setattr(module, "LIMIT_CHARACTERS", 10)
    with pytest.raises(ValueError, match=r"11 characters exceeds the limit of 10.*split the document"):
        opened.encode("ab cd ab cd")


def test_a_long_text_without_a_split_is_refused(folder, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 4)
    monkeypatch.setattr(module, "LIMIT_CHARACTERS", 20)
    monkeypatch.setattr("lit_data.tokenizers.cutting.LIMIT_CHARACTERS", 20)
    opened = open_tokenizer(folder / "byte_bpe")
    assert opened.decode(opened.encode("abcde " * 20)) == "abcde " * 20
    with pytest.raises(ValueError, match=r"in a row without a single space.*limit of 20"):
        opened.encode("x" * 30)


def test_the_fingerprint_depends_on_content_only(folder, tmp_path):
    source = folder / "byte_bpe" / "tokenizer.json"
    content = json.loads(source.read_text())
    fingerprint = open_tokenizer(source).fingerprint

    def changed(**changes: object) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
        return open_tokenizer(tmp_path).fingerprint

    model = content["model"]
    assert changed() == fingerprint  # another layout
    assert changed(post_processor=None, truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                                                    "direction": "Right"}) == fingerprint  # fmt: skip
    assert changed(model=model | {"merges": [" ".join(m) for m in model["merges"]]}) == fingerprint  # the older form
    assert changed(model=model | {"merges": model["merges"][:-1]}) != fingerprint
    assert changed(normalizer={"type": "NFC"}) != fingerprint
    assert changed(pre_tokenizer=content["pre_tokenizer"]["pretokenizers"][1]) != fingerprint
    assert open_tokenizer(folder / "sentencepiece").fingerprint != fingerprint


def test_truncation_and_dropout_in_the_file_are_ignored(folder, tmp_path):
    content = json.loads((folder / "byte_bpe" / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = open_tokenizer(folder / "byte_bpe").encode(TEXT).tolist()
    assert open_tokenizer(tmp_path).encode(TEXT).tolist() == expected


def test_eos_is_found_or_must_be_given(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder = bare_bpe(tmp_path / "none", ["[END]", *alphabet], [])
    with pytest.raises(ValueError, match=r"no end-of-document token.*--eos_token"):
        open_tokenizer(folder)
    with pytest.raises(ValueError, match=r"--eos_token \[FIN\]: .* has no such token"):
        open_tokenizer(folder, "[FIN]")
    assert open_tokenizer(folder, "[END]").eos_id == 0
    assert pickle.loads(pickle.dumps(open_tokenizer(folder, "[END]"))).eos_token == "[END]"
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "[END]"}}))
    assert open_tokenizer(folder).eos_token == "[END]"
    common = bare_bpe(tmp_path / "common", [*alphabet, "<|endoftext|>"], [])
    assert open_tokenizer(common).eos_id == 256


def test_eos_as_an_ordinary_added_token_is_still_text(tmp_path):
    token = {"id": 256, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False}
    added = [token | {"normalized": False, "special": False}]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    opened = open_tokenizer(bare_bpe(tmp_path / "x", [*alphabet, "</s>"], [], added_tokens=added))
    assert opened.eos_id == 256 and 256 not in opened.encode("a</s>")


def test_a_folder_prefers_the_json_and_a_file_overrides(folder, tmp_path):
    for source in (folder / "byte_bpe" / "tokenizer.json", folder / "sentencepiece" / "tokenizer.model"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert open_tokenizer(tmp_path).kind == "tokenizers"
    assert open_tokenizer(tmp_path / "tokenizer.model").kind == "sentencepiece"


def test_files_that_are_not_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*missing"):
        open_tokenizer(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor a .model"):
        open_tokenizer(tmp_path)
    for name, content in {
        "a.json": b"{",
        "b.json": b"{}",
        "c.json": b'{"model": {}}',
        "d.model": b"text",
        "e.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is (no|damaged)"):
            open_tokenizer(tmp_path / name)


def test_the_sentencepiece_file_is_read_like_the_library_does(tmp_path):
    path = train_sentencepiece(
        tmp_path / "m.model", model_type="bpe", vocab_size=400, byte_fallback=True, user_defined_symbols=["<x>"]
    )
    content, library = read_sentencepiece_file(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [(p.text, p.score) for p in content.pieces] == [
        (library.id_to_piece(i), library.get_score(i)) for i in range(library.vocab_size())
    ]
    for i, piece in enumerate(content.pieces):
        assert (piece.type == PieceType.CONTROL) == library.is_control(i)
        assert (piece.type == PieceType.BYTE) == library.is_byte(i)
    assert content.model_type == ModelType.BPE and content.byte_fallback and content.normalizer_name == "nmt_nfkc"
    assert content.add_dummy_prefix and content.remove_extra_whitespaces and content.escape_whitespaces
    (tmp_path / "cut.model").write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cut\.model is not a sentencepiece model"):
        open_tokenizer(tmp_path / "cut.model")


def test_text_is_cleaned_before_training(tmp_path):
    """--cleaner gives the tokenizer of the cleaned text, also with --max_sample_mb; empty documents are dropped."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "clean").mkdir()
    (tmp_path / "raw" / "childes.train").write_text("".join(f"A1: {text} [laughs]\n\n" for text in TEXTS))
    (tmp_path / "raw" / "switchboard.train").write_text("[x]")
    cleaned = re.sub(r"\s+", " ", re.sub(r"\(.*?\)", "", " ".join(TEXTS))).strip()
    (tmp_path / "clean" / "childes.train").write_text(cleaned)
    for sample in (None, 1):
        raw, clean = (
            train_tokenizer(
                TokenizerSettings(
                    (str(tmp_path / name),), 340, tmp_path / f"{name}-{sample}", cleaner=cleaner, max_sample_mb=sample
                )
            )
            for name, cleaner in (("raw", "babylm"), ("clean", None))
        )
        assert raw.fingerprint == clean.fingerprint
    with pytest.raises(ValueError, match="--cleaner babylon: choose one of"):
        train_tokenizer(TokenizerSettings((str(tmp_path / "raw"),), 340, tmp_path / "x", cleaner="babylon"))
