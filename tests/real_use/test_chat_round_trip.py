"""Round trip of a chat model: import, training, export; chat templates, EOS, BOS and ids stay the same.

The folders are opened by the installed transformers; if LLAMMLEIN_TRANSFORMERS_4 names the Python of an environment
with transformers 4.57.6 (the oldest supported version), a slow test opens them with that one too.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from chat_tokenizers import CHAT, FAMILIES, PLAIN, write_tokenizer
from running import ROOT, flags, script, train
from tokenizers import Tokenizer as Backend

from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.gguf import gguf_tokenizer
from lit_data.tokenizers.hf_export import write_hf_tokenizer
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_eval.model.text_encoding import check_folder
from lit_model.config import ModelConfig
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.init import initialise
from lit_model.load import load_tensors
from lit_model.model import GPT

transformers = pytest.importorskip("transformers")

BOS = ("llama3", "gemma2")  # were trained with BOS
TINY = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "intermediate_size": 48, "block_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "qwen3": {"qk_norm": "head", "head_size": 8},
    "gemma2": {
        "norm_offset": 1.0, "post_norm": True, "activation": "gelu_tanh", "scale_embeddings": True, "head_size": 8,
        "tie_embeddings": True, "attention_pattern": ("sliding", "full"), "sliding_window_size": 32,
    },
    "smollm2": {"tie_embeddings": True},
}  # fmt: skip
OPENED = ROOT / "tests" / "harness" / "tokenizer_facts.py"


def opened(folder: Path, python: str | None = None) -> dict[str, Any]:
    """What transformers reads from a folder's tokenizer and configs: see tests/harness/tokenizer_facts.py."""
    if python is None:
        from tokenizer_facts import describe

        return describe(folder, PLAIN, CHAT)
    call = [python, str(OPENED), str(folder), json.dumps([PLAIN, CHAT])]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model as a Hugging Face folder: random weights, the family's tokenizer."""
    family = request.param
    folder = tmp_path_factory.mktemp("chat") / family / "source"
    files = write_tokenizer(folder.parent / "files", family)
    tokenizer = open_tokenizer(files)
    config = ModelConfig(**{**TINY, **MODELS[family], "vocab_size": tokenizer.vocab_size})
    model = GPT(config)
    initialise(model, config, 0)
    hf = config_to_hf(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    write_folder(folder, hf, tensors_to_hf(config, model.state_dict()))
    for path in files.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(files)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(files)).write_bytes(path.read_bytes())
    return folder


def train_on(source: Path, family: str, folder: Path) -> Path:
    """As a user does it: import the model, prepare text with its tokenizer, train, export."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in PLAIN * 40))
    bos = ["--bos"] if family in BOS else []
    for call in (
        ["convert_from_hf.py", "--input", source, "--output", folder / "start.pth"],
        [
            "prepare_data.py",
            "--input",
            corpus,
            "--tokenizer",
            source,
            "--output",
            folder / "data",
            "--workers",
            1,
            *bos,
        ],
    ):
        done = script(*call)
        assert done.returncode == 0, done.stderr
    sizes = {f"model__{key}": None for key in TINY if key != "block_size"}
    train(*flags(folder / "data", folder / "run", data__val=None, init_from=folder / "start.pth", train__max_steps=2,
                 eval__every_steps=None, optim__warmup_steps=1, **sizes))  # fmt: skip
    done = script("convert_to_hf.py", "--checkpoint", folder / "run", "--output", folder / "hf")
    assert done.returncode == 0, done.stderr
    return folder / "hf"


@pytest.fixture(scope="module")
def trained(source: Path) -> Path:
    return train_on(source, source.parent.name, source.parent)


# Trained; by default the tokenizers of all families are compared below, without training.
ALL = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
families = pytest.mark.parametrize("source", ALL, indirect=True)


def compare(source: Path, trained: Path, family: str, python: str | None = None) -> None:
    was, became = opened(source, python), opened(trained, python)
    for key in ("chat", "prompt", "chat_ids", "short", "eos", "eos_id", "ended", "ends", "plain_ids"):
        assert became[key] == was[key], key
    kept = family != "qwen3"  # which has none
    assert became["bos"] == was["bos"] and (became["bos"] is not None) == kept
    assert became["ids"] == was["ids"], "BOS is not added as in the source, although the data has it"
    assert became["config_bos_id"] == became["generation_bos_id"] == became["bos_id"]
    same = {k: v for k, v in was["generation"].items() if not k.endswith("token_id")}
    assert became["generation"].items() >= same.items()


@families
def test_a_chat_model_survives_the_round_trip(source: Path, trained: Path) -> None:
    """apply_chat_template, EOS, BOS and ids of plain text in the trained model's folder equal the source's."""
    family = source.parent.name
    compare(source, trained, family)
    tokenizer = open_tokenizer(trained)
    assert tokenizer.fingerprint == open_tokenizer(source).fingerprint
    backend = Backend.from_file(str(source / "tokenizer.json"))
    assert opened(trained)["plain_ids"] == [backend.encode(t, add_special_tokens=False).ids for t in PLAIN]
    card = (trained / "README.md").read_text()
    assert "were encoded as text" in card
    assert ("the tokenizer puts it before a text" in card) == (family in BOS)
    assert ("The chat template prints" in card) == (family == "smollm2")
    _, before = load_tensors(source)
    _, after = load_tensors(trained)
    assert any(not torch.equal(after[name], before[name]) for name in after), (
        "the weights are those of the source: nothing was trained"
    )


@pytest.mark.slow
@families
def test_transformers_4_opens_it_identically(source: Path, trained: Path) -> None:
    """The same, opened by transformers 4.57 in a separate environment."""
    python = os.environ.get("LLAMMLEIN_TRANSFORMERS_4")
    if not python:
        pytest.skip("LLAMMLEIN_TRANSFORMERS_4 names no Python with transformers 4.57")
    compare(source, trained, source.parent.name, python)


@families
def test_generation_starts_like_the_data(source: Path, trained: Path) -> None:
    """generate.py puts BOS before a prompt if the training data had it, for the run and for its exported folder."""
    family = source.parent.name
    tokenizer = open_tokenizer(source)
    plain = tokenizer.encode("Der König").tolist()
    bos = [tokenizer.bos_id] if family in BOS else []
    for model in (trained, trained.parent / "run", source):
        call = ["generate.py", "--model", model, "--max_new_tokens", 1, "--temperature", 0, "--json"]
        found = json.loads(script(*call, "--prompt", "Der König").stdout)
        assert found["prompt_ids"] == [*bos, *plain], model
        assert json.loads(script(*call, "--prompt", "").stdout)["prompt_ids"] == (bos or [tokenizer.eos_id])
    ended = json.loads(script(*call, "--prompt", f"a{tokenizer.eos_token}").stdout)["prompt_ids"]
    assert ended[-1] == tokenizer.eos_id, "a Hugging Face folder's prompts are not parsed like in transformers"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["llama3", "smollm2"], indirect=True)
def test_gguf_and_verification_follow(source: Path, trained: Path, tmp_path: Path) -> None:
    """llama.cpp is told to begin with BOS where the data did, and gets the chat template; a folder that begins
    texts otherwise does not pass verify_hf."""
    gguf = pytest.importorskip("gguf")
    bos = source.parent.name in BOS
    for model in (trained.parent / "run", trained):
        file = tmp_path / f"{model.name}.gguf"
        assert script("convert_to_gguf.py", "--checkpoint", model, "--output", file).returncode == 0
        fields = gguf.GGUFReader(file).fields
        assert bool(fields["tokenizer.ggml.add_bos_token"].contents()) == bos
        assert fields["tokenizer.ggml.bos_token_id"].contents() == open_tokenizer(source).bos_id
        assert fields["tokenizer.chat_template"].contents() == opened(trained)["template"]
    validation = PackedDataset(trained.parent / "data" / "train")
    check_folder(trained.parent / "run", trained, open_tokenizer(trained), validation)
    write_hf_tokenizer(source, tmp_path / "other", bos=not bos)
    (tmp_path / "other" / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(ValueError, match="its tokenizer begins texts"):
        check_folder(trained.parent / "run", tmp_path / "other", open_tokenizer(tmp_path / "other"), validation)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_bos_in_the_data(family: str, tmp_path: Path) -> None:
    """Data without BOS: no text starts with one, and bos_token is kept only if a chat template prints it."""
    source = write_tokenizer(tmp_path / "source", family)
    write_hf_tokenizer(source, tmp_path / "hf")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    was = transformers.AutoTokenizer.from_pretrained(source)
    assert [found(t)["input_ids"] for t in PLAIN] == [was(t, add_special_tokens=False)["input_ids"] for t in PLAIN]
    assert found.bos_token == was.bos_token  # all of these templates print it
    assert found.apply_chat_template(CHAT, tokenize=False) == was.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_tokenizer_is_the_source(family: str, tmp_path: Path) -> None:
    """Chats, ids of text with special tokens, EOS, BOS and padding as in the source, for all four families."""
    source = write_tokenizer(tmp_path / "source", family)
    bos = family in BOS
    write_hf_tokenizer(source, tmp_path / "hf", bos=bos)
    for folder in (source, tmp_path / "hf"):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "hf" / "generation_config.json").write_text((source / "generation_config.json").read_text())
    was, became = opened(source), opened(tmp_path / "hf")
    differ = {key for key in was if was[key] != became[key]}
    assert not differ
    found, before = (transformers.AutoTokenizer.from_pretrained(f) for f in (tmp_path / "hf", source))
    text = "".join(before.all_special_tokens) + " a " + "b".join(before.all_special_tokens)
    assert found(text)["input_ids"] == before(text)["input_ids"]
    assert found.pad_token == (before.pad_token or before.eos_token)
    if family in ("llama3", "smollm2"):  # kinds that GGUF supports
        tokenizer = open_tokenizer(source)
        keys = gguf_tokenizer(tokenizer, tokenizer.vocab_size, bos=bos)
        assert keys["tokenizer.ggml.add_bos_token"] == bos and keys["tokenizer.chat_template"] == was["template"]


@pytest.mark.parametrize("template", [None, "{# bos_token #}{{ messages[0]['content'] }}"])
def test_an_unseen_bos_is_not_declared(template: str | None, tmp_path: Path) -> None:
    """Without BOS in the data or a template that prints it, no BOS is declared, so that EOS is used."""
    source = write_tokenizer(tmp_path / "source", "llama3")
    path = source / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    path.write_text(json.dumps(config if template is None else {**config, "chat_template": template}))
    write_hf_tokenizer(source, tmp_path / "hf")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert found.bos_token is None and found.bos_token_id is None and found.eos_token == "<|eot_id|>"
    assert "bos_token" not in json.loads((tmp_path / "hf" / "special_tokens_map.json").read_text())
    write_hf_tokenizer(source, tmp_path / "bos", bos=True)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "bos")
    assert found.bos_token == "<|begin_of_text|>" and found("a")["input_ids"][0] == found.bos_token_id
