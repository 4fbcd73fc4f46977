"""Golden numbers: small runs, a prepared dataset, an exported model and a record still give the stored results.

To show bit for bit that a change affects no number, run this file before and after it on one machine with
`--write_golden FILE` and compare the two files. `golden.json` contains the numbers of one such file for the default
suite; losses are compared with it to 1e-5, since CPUs round differently, and everything else exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import flags, metrics, script, train
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from whole_record import read_record

STORED = Path(__file__).with_name("golden.json")
STEPS = 20
COLUMNS = ("train_loss", "grad_norm")
EXPERTS = {
    "model__n_expert": 4,
    "model__n_expert_per_token": 2,
    "model__moe_intermediate_size": 16,
    "model__moe_layers": "[false,true]",
}
SENTENCES = (
    "Der Hund läuft über die Straße.",
    "Es war einmal ein König, der hatte 3 Töchter und 1250 Schafe.",
    "Ende gut, alles gut!",
    "The quick brown fox jumps over the lazy dog.",
    "naïve  日本 😀\n\n\tzwei  Zeilen",
)
MERGES = ("e r", "e n", "c h", "Ġ d", "i e", "a l", "Ġ e")


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def digest_of_json(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with a fixed vocabulary, not a trained one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split()) for merge in MERGES]
    names = ["<unk>", "</s>", *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def write_hf_model(folder: Path, tokenizer: Path) -> Path:
    """A Llama whose weights are exact, as multiples of 2^-10: they do not depend on any rounding."""
    vocab, C, heads, groups, hidden = 384, 16, 4, 2, 24
    D = C // heads
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (vocab, C),
        f"{block}self_attn.q_proj.weight": (heads * D, C),
        f"{block}self_attn.k_proj.weight": (groups * D, C),
        f"{block}self_attn.v_proj.weight": (groups * D, C),
        f"{block}self_attn.o_proj.weight": (C, heads * D),
        f"{block}mlp.gate_proj.weight": (hidden, C),
        f"{block}mlp.up_proj.weight": (hidden, C),
        f"{block}mlp.down_proj.weight": (C, hidden),
        f"{block}input_layernorm.weight": (C,),
        f"{block}post_attention_layernorm.weight": (C,),
        "model.norm.weight": (C,),
        "lm_head.weight": (vocab, C),
    }
    tensors = {
        name: (torch.arange(int(np.prod(shape))) * (7 + i) % 1013 - 506).reshape(shape) / 1024
        for i, (name, shape) in enumerate(shapes.items())
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": C,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": hidden,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 1,
        "bos_token_id": None,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def prepared(folder: Path, tokenizer: Path) -> dict[str, str]:
    """Checksums of a prepared dataset: of the shards' bytes, and of the content of its Parquet and JSON files."""
    corpus = folder / "corpus.jsonl"
    texts = [" ".join(SENTENCES[(i + k) % len(SENTENCES)] for k in range(1 + i % 7)) for i in range(120)]
    lines = [{"id": f"text-{i % 100}", "text": text, "year": 1900 + i} for i, text in enumerate(texts)]
    corpus.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    done = script(
        *("prepare_data.py", "--input", corpus, "--tokenizer", tokenizer, "--output", folder / "data"),
        *("--val_fraction", "0.2", "--metadata", "year", "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    return {
        f"{split}/{path.name}": sha256(path.read_bytes())
        for split in ("train", "val")
        for path in sorted((folder / "data" / split).iterdir())
        if path.suffix in (".bin", ".idx")
    } | {f"{split}/documents": digest_of_json(documents(folder / "data" / split)) for split in ("train", "val")}


def documents(dataset: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows = [row for path in sorted(dataset.glob("*.docs.parquet")) for row in pq.read_table(path).to_pylist()]
    return [row | {"source": Path(row["source"]).name} for row in rows]


def exported(folder: Path, tokenizer: Path) -> dict[str, str]:
    """Checksums of the files of a model imported from a Hugging Face folder and exported again."""
    given = write_hf_model(folder / "given", tokenizer)
    for line in (
        ("convert_from_hf.py", "--input", given, "--output", folder / "start.pth"),
        ("convert_to_hf.py", "--checkpoint", folder / "start.pth", "--output", folder / "hf", "--tokenizer", tokenizer),
    ):
        done = script(*line)
        assert done.returncode == 0, done.stderr
    files = sorted((folder / "hf").iterdir())
    return {path.name: sha256(path.read_bytes()) for path in files if path.suffix in (".json", ".safetensors")}


def runs(data: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Twenty steps each of a Llama with document masking, a mixture of experts, and a student of the Llama."""
    taught = {
        "objective": "distillation",
        "distillation__teachers": f"[{{path: {folder / 'llama'}}}]",
        "model__n_layer": 1,
    }
    for name, changes in (("llama", {}), ("experts", EXPERTS), ("distillation", taught)):
        shared = {"train__max_steps": STEPS, "save__every_steps": STEPS, "optim__warmup_steps": 5}
        train(*flags(data, folder / name, **shared, **changes))
        yield name, folder / name


def record_of(run: Path) -> str:
    """The checksum of a run's record, without the losses."""
    table = read_record(run).drop_columns(["loss"])
    order = [(name, "ascending") for name in ("step", "row", "document", "start")]
    return digest_of_json(table.sort_by(order).to_pylist())


@pytest.fixture(scope="module")
def numbers(
    data: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("golden")
    tokenizer = write_tokenizer(folder / "tokenizer")
    got: dict[str, dict[str, Any]] = {
        "prepared": prepared(folder, tokenizer),
        "exported": exported(folder, tokenizer),
        "record": {},
        "curves": {},
    }
    for name, run in runs(data, folder):
        got["record"][name] = record_of(run)
        rows = [row for row in metrics(run) if row["train_loss"]]
        got["curves"][name] = {column: [float(row[column]) for row in rows] for column in COLUMNS}
    target = pytestconfig.getoption("write_golden")
    if target is not None:
        Path(target).write_text(json.dumps(got, indent=1) + "\n")
    return got


@pytest.mark.parametrize("part", ["prepared", "exported", "record"])
def test_checksums(numbers: dict[str, dict[str, Any]], part: str) -> None:
    assert numbers[part] == json.loads(STORED.read_text())[part]


@pytest.mark.parametrize("run", ["llama", "experts", "distillation"])
def test_losses_and_gradient_norms(numbers: dict[str, dict[str, Any]], run: str) -> None:
    stored = json.loads(STORED.read_text())["curves"][run]
    for column in COLUMNS:
        got = numbers["curves"][run][column]
        assert len(got) == STEPS
        assert got == pytest.approx(stored[column], rel=1e-5), column
