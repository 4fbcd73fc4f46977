"""Tokenizer files for transformers: AutoTokenizer gives exactly the ids that preparation wrote."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
transformers = pytest.importorskip("transformers")

from lit_data.tokenizers.files import save_tokenizer  # noqa: E402
from lit_data.tokenizers.hf_export import HARD_STRINGS, begins_with_bos, write_hf_tokenizer  # noqa: E402
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer  # noqa: E402
from lit_data.tokenizers.training import train_on_texts  # noqa: E402

TEXTS = [
    "Der Hund läuft über die Straße, und die Katze (sie heißt Mia) schläft 24 Stunden am Tag. Ende gut, alles gut! "
    * 3,
    "Es war einmal ein König, der hatte 3 Töchter und 1250 Schafe; die aßen an einem Tag 7,5 % des Grases. " * 3,
]


def train_sentencepiece(path: Path, lines: list[str] = TEXTS, **settings: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5), model_writer=model, minloglevel=2, num_threads=1, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def check(tokenizer: Tokenizer, output: Path) -> transformers.PreTrainedTokenizerBase:
    """Independent of the module's own check: transformers reads everything back from the folder."""
    write_hf_tokenizer(tokenizer, output)
    # As in an exported model's folder: for this type transformers has a tokenizer class of its own.
    (output / "config.json").write_text(json.dumps({"model_type": "llama"}))
    opened = transformers.AutoTokenizer.from_pretrained(str(output))
    texts = [*HARD_STRINGS, *TEXTS, "</s>".join(TEXTS)]
    for text in texts:
        if not tokenizer.may_hold_special(text):
            assert list(opened(text)["input_ids"]) == tokenizer.encode(text).tolist(), text
        elif tokenizer.kind == "tokenizers":  # as configured in the file itself
            source = tokenizers.Tokenizer.from_file(str(tokenizer.path))
            assert list(opened(text)["input_ids"]) == source.encode(text, add_special_tokens=False).ids, text
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    assert (opened.eos_token_id, opened.bos_token_id, opened.pad_token_id) == (tokenizer.eos_id, None, pad_id)
    assert len(opened) == tokenizer.vocab_size
    assert tokenizer.eos_id in opened("x</s>y")["input_ids"]
    with_bos = transformers.AutoTokenizer.from_pretrained(str(write_with_bos(tokenizer, output)))
    assert with_bos.bos_token_id == tokenizer.bos_id == with_bos(TEXTS[0])["input_ids"][0]
    assert with_bos(TEXTS[0])["input_ids"][1:] == tokenizer.encode(TEXTS[0]).tolist()
    return opened


def write_with_bos(tokenizer: Tokenizer, output: Path) -> Path:
    folder = output.with_name(f"{output.name}_bos")
    write_hf_tokenizer(tokenizer, folder, bos=True)
    return folder


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_our_own_tokenizers(tmp_path, kind):
    tokenizer = train_on_texts(TEXTS, 340, kind, tmp_path / "trained")
    opened = check(tokenizer, tmp_path / "hf")
    assert opened.decode(opened("Ein </s> Wort")["input_ids"]) == "Ein </s> Wort"
    again = open_tokenizer(tmp_path / "hf")
    assert again.eos_id == tokenizer.eos_id
    assert (again.fingerprint == tokenizer.fingerprint) == (kind == "byte_bpe")


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe", "vocab_size": 150},  # as LLäMmlein's: nmt_nfkc, dummy prefix, extra spaces removed
        {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "vocab_size": 150, "remove_extra_whitespaces": False},
        {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "user_defined_symbols": ["<mask>", "\n", "<m"]},
        {"model_type": "unigram", "hard_vocab_limit": False, "vocab_size": 120},
        {
            "model_type": "unigram",
            "hard_vocab_limit": False,
            "vocab_size": 370,
            "byte_fallback": True,
            "normalization_rule_name": "nfkc_cf",
        },
        {
            "model_type": "unigram",
            "hard_vocab_limit": False,
            "vocab_size": 120,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
    ],
)
def test_sentencepiece_models_are_converted(tmp_path, settings):
    check(open_tokenizer(train_sentencepiece(tmp_path / "m.model", **settings)), tmp_path / "hf")


def test_names_of_special_tokens_stay_text_in_unigram_models(tmp_path):
    lines = [*TEXTS, "a < b > c / s <b>fett</b> <s>durch</s> 0x41 <0x41>"]
    path = train_sentencepiece(
        tmp_path / "m.model", lines, model_type="unigram", vocab_size=390, hard_vocab_limit=False, byte_fallback=True
    )
    check(open_tokenizer(path), tmp_path / "hf")


def test_bos_and_metaspace_of_the_source_are_not_rebuilt(tmp_path):
    """A small version of LLäMmlein's folder: the class named in its config would add BOS and another prefix."""
    converted = tmp_path / "converted"
    source = train_sentencepiece(
        tmp_path / "m.model", model_type="bpe", vocab_size=150, normalization_rule_name="identity"
    )
    write_hf_tokenizer(source, converted)
    content = json.loads((converted / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    content["added_tokens"] += [{"id": 150, "content": "\n", **flags}, {"id": 151, "content": "<", **flags}]
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "eos_token": "</s>",
              "bos_token": "<s>", "pad_token": None, "model_max_length": 512}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.vocab_size == 152 and 151 in tokenizer.encode("</s>")
    opened = check(tokenizer, tmp_path / "hf")
    assert opened.model_max_length == 512
    assert open_tokenizer(tmp_path / "hf").fingerprint == tokenizer.fingerprint


def test_unconvertible_tokenizers_are_refused(tmp_path, monkeypatch):
    path = train_sentencepiece(tmp_path / "char.model", model_type="char", vocab_size=60)
    with pytest.raises(ValueError, match=r"char\.model can't be written for transformers: its model is of type CHAR"):
        write_hf_tokenizer(path, tmp_path / "hf")
    path = train_sentencepiece(tmp_path / "m.model", model_type="bpe", vocab_size=150)
    monkeypatch.setattr("lit_data.tokenizers.hf_export._merges", lambda pieces: [])
    with pytest.raises(ValueError, match=r"gives other ids for '.+'"):
        write_hf_tokenizer(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_unlimited_length_is_no_damage(tmp_path):
    """transformers writes 10^30 as the length of a tokenizer without a limit: LLäMmlein's and most others have it."""
    unlimited = {"model_max_length": int(1e30), "add_bos_token": False}
    folder = tmp_path / "tok"
    train_on_texts(TEXTS, 300, "byte_bpe", folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | unlimited))
    tokenizer = open_tokenizer(folder)
    assert not begins_with_bos(tokenizer)
    write_hf_tokenizer(tokenizer, tmp_path / "hf")
    other = next(id for id, token in tokenizer.vocabulary() if token.strip())
    save_tokenizer(open_tokenizer(folder, eos_token=tokenizer.id_to_token(other)), tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["model_max_length"] == int(1e30)
