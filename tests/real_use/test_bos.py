"""Documents that start with BOS, and everything that depends on the manifest's bos_id; parsing of special tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from chat_tokenizers import FAMILIES, PLAIN, write_tokenizer
from running import flags, script, train

from lit_data.packed.manifest import MANIFEST, read_manifest
from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_data.tokenizers.unit_encoder import UnitEncoder
from lit_eval.model.text_encoding import unlike_start
from lit_model.config import ModelConfig
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.model import GPT

CHATTY = [
    "<|im_start|>user\nWas?<|im_end|>\n",
    "plain text only",
    "<|im_start|>a<|im_end|>",
    "  <|im_end|> x <|im_start|>  ",
]


def write_corpus(folder: Path, texts: list[str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def prepare(corpus: Path, tokenizer: Path, output: Path, *more: object) -> Any:
    return script("prepare_data.py", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 1,
                  *more)  # fmt: skip


def documents_of(folder: Path) -> list[list[int]]:
    dataset = PackedDataset(folder)
    starts = dataset.document_start(np.arange(dataset.n_documents + 1)).tolist()
    return [dataset.tokens(a, b).tolist() for a, b in pairwise(starts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_start_with_bos(family: str, tmp_path: Path) -> None:
    """--bos puts the tokenizer's BOS before each document and into the manifest; nothing else changes."""
    folder = write_tokenizer(tmp_path / "tokenizer", family)
    corpus = write_corpus(tmp_path, PLAIN)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [backend.encode(text, add_special_tokens=False).ids for text in PLAIN]
    assert prepare(corpus, folder, tmp_path / "plain").returncode == 0
    plain = read_manifest(tmp_path / "plain/train")
    assert documents_of(tmp_path / "plain/train") == [[*ids, plain.eos_id] for ids in expected]
    assert not {"bos_id", "special_tokens"} & json.loads((tmp_path / "plain/train" / MANIFEST).read_text()).keys()
    done = prepare(corpus, folder, tmp_path / "bos", "--bos")
    if family == "qwen3":
        assert done.returncode == 2 and "has no beginning-of-sequence token" in done.stderr
        assert not (tmp_path / "bos").exists()
        return
    with_bos = read_manifest(tmp_path / "bos/train")
    bos = open_tokenizer(folder).bos_id
    assert with_bos.bos_id == bos and with_bos.fingerprint != plain.fingerprint
    assert documents_of(tmp_path / "bos/train") == [[bos, *ids, plain.eos_id] for ids in expected]


def test_units_with_bos_equal_whole_texts(tmp_path: Path) -> None:
    """The caching encoder gives the same ids as encoding whole texts, also for empty texts."""
    tokenizer = open_tokenizer(write_tokenizer(tmp_path, "smollm2"))
    encoder = UnitEncoder(tokenizer, np.uint16, bos=True)
    assert encoder.by_units and encoder.marks == 2
    for texts in ([], [""], ["", "a b", ""], PLAIN * 3, ["ab cd " * 5, ""]):
        ids, lengths = encoder.encode(texts)
        expected = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
        assert lengths.tolist() == [len(d) for d in expected] and ids.tolist() == [i for d in expected for i in d]


@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens_are_text_or_parsed(bos: bool, tmp_path: Path) -> None:
    """Rendered chat templates are text, or tokens with --special_tokens parse, without doubling BOS or EOS."""
    folder = write_tokenizer(tmp_path / "tokenizer", "smollm2")
    corpus = write_corpus(tmp_path, [*CHATTY, "<|im_end|>", ""])
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    flag = ["--bos"] if bos else []
    done = prepare(corpus, folder, tmp_path / "parsed", "--special_tokens", "parse", *flag)
    assert done.returncode == 0 and "2 empty ones" in done.stdout, done.stdout + done.stderr
    start, end = (backend.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert start == open_tokenizer(folder).bos_id and end == open_tokenizer(folder).eos_id
    expected = []
    for text in CHATTY:
        ids = backend.encode(text, add_special_tokens=False).ids
        ids = ids if not bos or ids[0] == start else [start, *ids]
        expected.append(ids if ids[-1] == end else [*ids, end])
    assert documents_of(tmp_path / "parsed/train") == expected
    manifest = read_manifest(tmp_path / "parsed/train")
    assert manifest.special_tokens == "parse"
    assert prepare(corpus, folder, tmp_path / "text", *flag).returncode == 0
    backend.encode_special_tokens = True
    plain = [backend.encode(t, add_special_tokens=False).ids for t in [*CHATTY, "<|im_end|>"]]
    assert documents_of(tmp_path / "text/train") == [[*([start] if bos else []), *ids, end] for ids in plain]
    assert read_manifest(tmp_path / "text/train").fingerprint != manifest.fingerprint


def test_a_preparation_with_other_bos_settings_is_not_resumed(tmp_path: Path) -> None:
    """The unfinished work of an interrupted call is only resumed with the same --bos and --special_tokens."""
    folder = write_tokenizer(tmp_path / "tokenizer", "smollm2")
    corpus = write_corpus(tmp_path, PLAIN)
    output = tmp_path / "out"
    call = ["--parts", 1, "--stage", "encode"]
    assert prepare(corpus, folder, output, *call).returncode == 0
    for more, message in (("--bos", "--bos False, now True"), ("--special_tokens=parse", "--special_tokens text, now")):
        done = prepare(corpus, folder, output, "--stage", "merge", more)
        assert done.returncode == 2 and message in done.stderr
    assert prepare(corpus, folder, output, "--stage", "merge").returncode == 0


def test_a_sentencepiece_model_cannot_parse(tmp_path: Path) -> None:
    """A .model always encodes the names of control tokens as text: the error names the alternative."""
    corpus = write_corpus(tmp_path, ["a b c d e f g " * 20])
    done = script("train_tokenizer.py", "--input", corpus, "--type", "sentencepiece", "--vocab_size", 270,
                  "--output", tmp_path / "tokenizer")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = prepare(corpus, tmp_path / "tokenizer/tokenizer.model", tmp_path / "out", "--special_tokens", "parse")
    assert done.returncode == 2 and "save_pretrained" in done.stderr and not (tmp_path / "out").exists()
    assert prepare(corpus, tmp_path / "tokenizer/tokenizer.model", tmp_path / "out", "--bos").returncode == 0
    assert {ids[0] for ids in documents_of(tmp_path / "out/train")} == {read_manifest(tmp_path / "out/train").bos_id}


def test_imported_tokens_store_that_they_start_with_bos(tmp_path: Path) -> None:
    """import_tokens --bos stores it in the manifest, after checking every document."""
    folder = write_tokenizer(tmp_path / "tokenizer", "gemma2")
    corpus = write_corpus(tmp_path, PLAIN)
    for name, more in (("bos", ["--bos"]), ("plain", [])):
        assert prepare(corpus, folder, tmp_path / name, *more).returncode == 0
    source = tmp_path / "bos/train/data-00000"
    call = ["import_tokens.py", "--tokenizer", folder, "--input"]
    assert script(*call, source, "--output", tmp_path / "a", "--bos").returncode == 0
    assert read_manifest(tmp_path / "a").fingerprint == read_manifest(tmp_path / "bos/train").fingerprint
    assert script(*call, source, "--output", tmp_path / "b", "--bos", "--copy").returncode == 0
    assert script(*call, source, "--output", tmp_path / "c").returncode == 0
    assert read_manifest(tmp_path / "b").bos_id == 2 and read_manifest(tmp_path / "c").bos_id is None
    done = script(*call, tmp_path / "plain/train/data-00000", "--output", tmp_path / "d", "--bos")
    assert done.returncode == 2 and "document 1 does not begin with the id 2 of BOS" in done.stderr
    assert not (tmp_path / "d").exists()
    flat = tmp_path / "flat.npy"
    np.save(flat, np.asarray([2, 300, 1, 301, 1], dtype=np.uint16))
    done = script(*call, flat, "--output", tmp_path / "d", "--bos", "--split_at", 1)
    assert done.returncode == 2 and "does not begin with the beginning-of-sequence id 2" in done.stderr
    done = script("import_tokens.py", "--input", flat, "--output", tmp_path / "d", "--bos", "--vocab_size", 400,
                  "--eos_id", 1)  # fmt: skip
    assert done.returncode == 2 and "--bos needs --tokenizer" in done.stderr


def test_init_from_a_model_trained_with_bos(tmp_path: Path) -> None:
    """Data without BOS for a model that was trained with it causes a message; so does the opposite."""
    source = write_tokenizer(tmp_path / "llama3", "llama3")
    corpus = write_corpus(tmp_path, PLAIN)
    for name, more in (("plain", []), ("bos", ["--bos"])):
        assert prepare(corpus, source, tmp_path / name, *more).returncode == 0
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, intermediate_size=8, block_size=16, vocab_size=385)
    write_folder(tmp_path / "model", config_to_hf(config), tensors_to_hf(config, GPT(config).state_dict()))
    for path in source.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    done = script("convert_from_hf.py", "--input", tmp_path / "model", "--output", tmp_path / "start.pth")
    assert done.returncode == 0, done.stderr
    plain, bos = (PackedDataset(tmp_path / name / "train") for name in ("plain", "bos"))
    for start in (tmp_path / "model", tmp_path / "start.pth"):
        assert unlike_start(start, bos) is None
        assert "prepare the data with --bos" in (unlike_start(start, plain) or "")
    ids = json.loads((source / "generation_config.json").read_text())
    call = ["generate.py", "--model", tmp_path / "start.pth", "--tokenizer", source, "--max_new_tokens", 1, "--json"]
    assert json.loads(script(*call, "--prompt", "").stdout)["prompt_ids"] == [ids["bos_token_id"]]
    write_tokenizer(tmp_path / "model", "llama3", add_bos_token=False)
    assert unlike_start(tmp_path / "model", plain) is None
    assert "without --bos" in (unlike_start(tmp_path / "model", bos) or "")


@pytest.mark.slow
def test_datasets_of_a_run_must_agree_on_bos(tmp_path: Path) -> None:
    """A validation set or a mixture that differs in BOS is refused before the run folder is created;
    data with differently encoded special tokens causes a warning."""
    folder = write_tokenizer(tmp_path / "tokenizer", "smollm2")
    corpus = write_corpus(tmp_path, PLAIN * 10)
    for name, more in (("plain", []), ("bos", ["--bos"]), ("parsed", ["--special_tokens", "parse"])):
        assert prepare(corpus, folder, tmp_path / name, *more).returncode == 0

    def run(name: str, val: str, **more: object) -> Any:
        changes = {"data__train": tmp_path / name / "train", "data__val": tmp_path / val / "train", **more}
        return train(*flags(tmp_path, tmp_path / "run", train__max_steps=2, **changes), check=False)

    done = run("plain", "bos")
    assert done.returncode == 2 and "documents begin with BOS" in done.stdout and "both with --bos" in done.stdout
    assert not (tmp_path / "run").exists()
    mixture = json.dumps([{"path": str(tmp_path / n / "train"), "weight": 1} for n in ("bos", "plain")])
    done = run("bos", "bos", data__train=None, data__mixture=mixture)
    assert done.returncode == 2 and "--data.mixture" in done.stdout and not (tmp_path / "run").exists(), done.stdout
    done = run("plain", "parsed")
    assert done.returncode == 0 and "prepared with --special_tokens parse" in done.stdout, done.stdout
