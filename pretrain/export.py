"""Checkpoint <-> Hugging Face folder, with tokenizer and model card; and -> GGUF.

The names and numbers are `lit_model/hf`'s.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_data.gguf_tokenizer import gguf_tokenizer
from lit_data.hf_tokenizer import write_hf_tokenizer
from lit_data.tokenizer import Tokenizer, open_tokenizer
from lit_model.cost import count_parameters
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.gguf import architecture_of, write_gguf
from lit_model.hf.io import read_folder, write_folder
from lit_model.load import Checkpoint, checkpoint_step, is_hf_folder, load_tensors, resolve


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer of a run folder, of a checkpoint in one, or of a Hugging Face folder; None if there is none."""
    path = Path(path)
    if is_hf_folder(path):
        has_files = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return path if has_files else None
    run = path.parent if path.is_file() or checkpoint_step(path) is not None else path
    return run / "tokenizer" if (run / "tokenizer").is_dir() else None


def export_to_hf(source: Path, output: Path, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint (or a run folder's newest) as a Hugging Face folder, whole or not at all.

    Args:
        tokenizer: default: the one in the run folder; without one the folder has no tokenizer files.

    Returns the checkpoint that was read. Raises ValueError or FileNotFoundError that name the path.
    """
    path = resolve(source)
    if is_hf_folder(path):
        raise ValueError(f"{path} is a Hugging Face folder already")
    checkpoint = Checkpoint(path)
    config = checkpoint.model_config
    tokenizer_path = tokenizer or find_tokenizer(path)
    opened = open_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    facts: dict[str, Any] = (checkpoint.meta.get("data") or {}).get("tokenizer") or {}
    if opened is not None and opened.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer_path} has {opened.vocab_size} ids, the model {path} only {config.vocab_size}: "
            "give the one the model was trained with by --tokenizer"
        )
    if opened is not None and facts and opened.fingerprint != facts["fingerprint"]:
        raise ValueError(f"{tokenizer_path} is not the tokenizer that {path} was trained with (fingerprints differ)")
    eos_id = opened.eos_id if opened is not None else facts.get("eos_id")
    bos_id = opened.bos_id if opened is not None else facts.get("bos_id")
    layout = list(tensors_to_hf(config, checkpoint.model_layout()))
    dtype = str(layout[0][1].dtype).removeprefix("torch.")
    write_folder(
        output,
        config_to_hf(config, bos_id=bos_id, eos_id=eos_id, dtype=dtype),
        tensors_to_hf(config, checkpoint.passing_tensors()),
        layout=layout,
        generation_config={"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True},
        extra_files={**_tokenizer_files(opened), "README.md": model_card(checkpoint)},
    )
    return path


def export_to_gguf(
    source: Path,
    output: Path,
    *,
    dtype: str = "float16",
    tokenizer: Path | None = None,
    pre_tokenizer: str | None = None,
) -> Path:
    """Write a checkpoint, a run folder's newest or a Hugging Face folder as one GGUF file, whole or not at all.

    Args:
        dtype: of the matrices: float32, float16 or bfloat16.
        tokenizer: default: the one beside the model. Raises ValueError if there is none.
        pre_tokenizer: see `lit_data.gguf_tokenizer`.

    Returns the checkpoint that was read. Raises ValueError or FileNotFoundError that name the path.
    """
    path = resolve(source)
    config, tensors = load_tensors(path)
    architecture_of(config)  # raises for a family that GGUF does not have
    found = tokenizer or find_tokenizer(path)
    if found is None:
        raise ValueError(f"{path} has no tokenizer beside it: give one by --tokenizer")
    keys = gguf_tokenizer(open_tokenizer(found), config.vocab_size, pre_tokenizer)
    write_gguf(output, config, tensors, dtype=dtype, tokenizer=keys)
    return path


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        write_hf_tokenizer(tokenizer, Path(folder))
        return {p.name: p.read_text(encoding="utf-8") for p in Path(folder).iterdir()}


def model_card(checkpoint: Checkpoint) -> str:
    """README.md of an exported model: what it is, what it saw, how it was trained."""
    meta, config = checkpoint.meta, checkpoint.model_config
    data = meta.get("data") or {}
    card = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llammlein"]}
    facts = [
        ("Parameters", f"{count_parameters(config):,}"),
        ("Optimizer steps", f"{meta['step']:,}" + (f" of {meta['max_steps']:,}" if meta.get("max_steps") else "")),
        ("Tokens seen", f"{meta['tokens']:,}" if meta.get("tokens") is not None else "unknown"),
        ("Training data", f"{data['n_documents']:,} documents, {data['n_tokens']:,} tokens" if data else "unknown"),
        ("Data fingerprint", ", ".join(f"`{name}`" for name in data["train"]) if data else "unknown"),
        ("Tokenizer fingerprint", f"`{data['tokenizer']['fingerprint']}`" if data else "unknown"),
        ("Checkpoint", f"`{checkpoint.path.name}`"),
    ]
    lines = [
        "---",
        yaml.safe_dump(card, sort_keys=False).strip(),
        "---",
        "",
        f"# {config.name or 'Language model'}",
        "",
        "A decoder-only language model pretrained with llammlein.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "## Model",
        "",
        "```json",
        json.dumps(config.to_dict(), indent=1),
        "```",
        "",
    ]
    if meta.get("config"):
        lines += [
            "## Training",
            "",
            "```yaml",
            yaml.safe_dump(_portable(meta["config"]), sort_keys=False).strip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The run's settings without folders of the machine it ran on."""
    out = {k: v for k, v in config.items() if k not in ("out_dir", "resume", "resume_allow", "init_from")}
    out["data"] = {k: v for k, v in config["data"].items() if k not in ("train", "val")}
    return out


def import_from_hf(source: Path, output: Path) -> None:
    """Write a Hugging Face folder as a checkpoint file, for --init_from. Nothing is left of a failed attempt."""
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    if not is_hf_folder(source):
        raise FileNotFoundError(f"{source} is no Hugging Face folder: it has no config.json")
    config, tensors = read_folder(source)
    meta = {"format_version": 1, "step": 0, "model_config": config.to_dict(), "source": source.resolve().name}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"model": dict(tensors), "optimizer": {}, "meta": json.dumps(meta)}, f)
            f.flush()
            os.fsync(f.fileno())
        os.rename(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
