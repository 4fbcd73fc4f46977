"""Converts between checkpoints and Hugging Face folders, with tokenizer and model card, and exports to GGUF.

Tensor names and config fields are mapped by `lit_model/hf`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_data.tokenizers.gguf import gguf_tokenizer
from lit_data.tokenizers.hf_export import declared_bos, prints_bos, write_hf_tokenizer
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_eval.model.model_tokenizer import (
    KnownTokenizer,
    check_own_tokenizer,
    facts_of,
    find_tokenizer,
    ids_without_token,
    of_files,
)
from lit_eval.model.text_encoding import Encoding, encoding_of
from lit_files.checkpoint_name import budget_name
from lit_files.nested_run import did_you_mean_run
from lit_files.publish import replace_file, replace_folder, scratch_folder
from lit_files.reading import read_foreign_object
from lit_files.run_files import HF
from lit_model.config import ModelConfig
from lit_model.cost import count_parameters
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.gguf import check_dtype, write_gguf
from lit_model.hf.io import read_folder, write_folder
from lit_model.load import FORMAT_VERSION, Checkpoint, is_hf_folder, load_tensors, resolve
from pretrain.checkpoint.contents import word_budgets_in
from pretrain.logs.messages import say


@dataclass(frozen=True)
class CardAdditions:
    """Additions to the checkpoint's facts in a model card.

    Attributes:
        metadata: for the front matter, such as `license`.
        facts: rows of the first table.
        sections: Markdown, each with its heading.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[str] = ()


def export_to_hf(
    source: Path, output: Path, tokenizer: Path | None = None, card: CardAdditions = CardAdditions()
) -> Path:
    """Write a checkpoint (or a run folder's newest) as a Hugging Face folder, atomically.

    Args:
        tokenizer: default: the one in the run folder; without one, no tokenizer files are written.
        card: additions to the model card.

    Returns the checkpoint that was read. Raises ValueError or FileNotFoundError naming the path.
    """
    path = resolve(source)
    if is_hf_folder(path):
        raise ValueError(f"{path} is a Hugging Face folder already")
    checkpoint = Checkpoint(path)
    config = checkpoint.model_config
    tokenizer_path = tokenizer or find_tokenizer(path)
    opened = open_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    facts = facts_of(checkpoint.meta)
    if opened is not None and opened.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer_path} has {opened.vocab_size} ids, the model {path} only {config.vocab_size}: "
            "give the one the model was trained with by --tokenizer"
        )
    check_own_tokenizer(path, tokenizer_path)
    encoding = encoding_of(path, opened)
    eos_id = opened.eos_id if opened is not None else facts.get("eos_id")
    bos_id = declared_bos(opened, encoding.bos_id is not None) if opened is not None else encoding.bos_id
    generation = _generation_config(opened, bos_id, eos_id)
    if empty := ids_without_token(path, opened, config.vocab_size):  # transformers' generate never samples these
        generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or []), *empty})
    layout = list(tensors_to_hf(config, checkpoint.model_layout()))
    dtype = str(layout[0][1].dtype).removeprefix("torch.")
    write_folder(
        output,
        config_to_hf(config, bos_id=bos_id, eos_id=eos_id, dtype=dtype),
        tensors_to_hf(config, checkpoint.passing_tensors()),
        layout=layout,
        generation_config=generation,
        extra_files={**_tokenizer_files(opened, encoding), "README.md": model_card(checkpoint, opened, encoding, card)},
    )
    return path


def export_run(run: Path, again: bool = True) -> int:
    """Write the model of a run that has ended as RUN/hf; if there is one, `again` or not. Returns the exit status: 1,
    with a message, if it could not be written.
    """
    folder = run / HF
    if folder.exists() and not again:
        return 0
    try:
        if folder.exists() and not is_hf_folder(folder):
            raise ValueError("it holds something else")
        with scratch_folder(folder) as parts:
            export_to_hf(run, parts / HF)
            replace_folder(parts / HF, folder)
    except (ValueError, OSError) as error:
        print(
            f"error: the run is complete, but {folder} could not be written: {error}; repeat it with "
            f"python scripts/convert_to_hf.py --checkpoint {run} --output {folder}",
            file=sys.stderr,
        )
        return 1
    say(f"Hugging Face model: {folder}")
    return 0


def export_word_budgets(run: Path, output: Path, tokenizer: Path | None = None) -> dict[Path, Path | None]:
    """Write a run's checkpoints at word budgets (--save.at_words) as OUTPUT/chck_1M, OUTPUT/chck_2M and so on, as
    BabyLM's evaluation names them.

    Returns the checkpoint of each folder; None where the folder existed already and was left unchanged. Raises
    ValueError if the run has none, and as `export_to_hf`.
    """
    found = word_budgets_in(run)
    if not found:
        near = did_you_mean_run(run)
        raise ValueError(
            f"{run} holds no checkpoint at a word budget: train with --save.at_words, such as babylm{near}"
        )
    written: dict[Path, Path | None] = {}
    for words, path in found.items():
        folder = output / f"chck_{budget_name(words)}"
        written[folder] = None if folder.exists() else export_to_hf(path, folder, tokenizer)
    return written


def export_to_gguf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "float16",
    tokenizer: Path | None = None,
    pre_tokenizer: str | None = None,
) -> Path:
    """Write a checkpoint, a run folder's newest or a Hugging Face folder as one GGUF file, atomically.

    Args:
        dtype: of the matrices: float32, float16, bfloat16 or q8_0.
        tokenizer: default: the one next to the model. Raises ValueError if there is none.
        pre_tokenizer: see `lit_data.tokenizers.gguf`.

    Returns the checkpoint that was read. Raises ValueError or FileNotFoundError naming the path.
    """
    path = resolve(checkpoint)
    config, tensors = load_tensors(path)
    keys = check_gguf(path, config, dtype, tokenizer, pre_tokenizer)
    write_gguf(output, config, tensors, dtype=dtype, tokenizer=keys)
    return path


def check_gguf(
    path: Path, config: ModelConfig, dtype: str, tokenizer: Path | None, pre_tokenizer: str | None
) -> dict[str, Any]:
    """Return the tokenizer's metadata for a GGUF file. Raises as `export_to_gguf`, but for the weights."""
    check_dtype(config, dtype)
    found = tokenizer or find_tokenizer(path)
    if found is None:
        raise ValueError(f"{path} has no tokenizer beside it: give one by --tokenizer")
    check_own_tokenizer(path, found)
    opened = open_tokenizer(found)
    bos = encoding_of(path, opened).bos_id is not None
    return gguf_tokenizer(opened, config.vocab_size, pre_tokenizer, bos=bos)


def _tokenizer_files(tokenizer: Tokenizer | None, encoding: Encoding) -> dict[str, str]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf_tokenizer(tokenizer, folder, bos=encoding.bos_id is not None)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}


def _generation_config(tokenizer: Tokenizer | None, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The generation config next to the tokenizer, with the given BOS, and EOS added to the stop ids."""
    path = tokenizer.path.with_name("generation_config.json") if tokenizer is not None else None
    if tokenizer is None or path is None or not path.is_file():
        return {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
    kept = {k: v for k, v in read_foreign_object(path).items() if not k.startswith("_") and k != "transformers_version"}

    def known(id: Any) -> bool:
        return type(id) is int and 0 <= id < tokenizer.vocab_size and tokenizer.id_to_token(id) is not None

    given = kept.get("eos_token_id")
    ends = [id for id in (given if isinstance(given, list) else [given]) if known(id)]
    ends = ends if eos_id is None or eos_id in ends else [eos_id, *ends]
    if not known(kept.get("pad_token_id")):
        kept.pop("pad_token_id", None)
    return {
        **kept,
        "bos_token_id": bos_id,
        "eos_token_id": ends if isinstance(given, list) or len(ends) > 1 else eos_id,
    }


SOFT_CAP_NOTE = (
    'Open it with transformers 5.21 or newer, or with `attn_implementation="eager"`: earlier versions leave out the '
    "soft-cap of attention scores."
)


def tokenizer_notes(tokenizer: Tokenizer, encoding: Encoding) -> list[str]:
    """Notes for the model card: how the tokenizer differs from the encoding of the training data."""
    name = tokenizer.id_to_token(tokenizer.bos_id) if tokenizer.bos_id is not None else None
    notes = []
    if encoding.bos_id is not None:
        notes.append(f"Training documents began with `{name}`; the tokenizer puts it before a text.")
    elif prints_bos(tokenizer):
        notes.append(
            f"The chat template prints `{name}`, so it is declared as `bos_token`. Training documents did not begin "
            "with it: without the template, begin a text with nothing, and have an evaluation that needs a first token "
            f"use `{tokenizer.eos_token}`."
        )
    else:
        notes.append("Training documents began with their text: no `bos_token` is declared.")
    if encoding.special_tokens == "text":
        seen = [f"`{token}`" for token in (name if encoding.bos_id is not None else None, tokenizer.eos_token) if token]
        notes.append(
            f"Names of special tokens in training documents, such as `{tokenizer.eos_token}`, were encoded as text. "
            "This tokenizer gives them their ids, as chat templates need it; as ids, training saw only "
            f"{' and '.join(seen)}."
        )
    elif encoding.special_tokens is not None:
        some = "" if encoding.special_tokens == "parse" else " in a part of the data, and encoded as text in the rest"
        notes.append(
            f"Names of special tokens in training documents were given their ids{some}, as this tokenizer does."
        )
    return notes


def model_card(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None = None,
    encoding: Encoding | None = None,
    additions: CardAdditions = CardAdditions(),
) -> str:
    """README.md of an exported model: architecture, training data, training settings."""
    meta, config = checkpoint.meta, checkpoint.model_config
    data = meta.get("data") or {}
    notes = tokenizer_notes(tokenizer, encoding) if tokenizer is not None and encoding is not None and data else []
    card = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llammlein"]}
    card |= additions.metadata
    facts = [
        ("Parameters", f"{count_parameters(config):,}"),
        ("Optimizer steps", f"{meta['step']:,}" + (f" of {meta['max_steps']:,}" if meta.get("max_steps") else "")),
        ("Tokens seen", f"{meta['tokens']:,}" if meta.get("tokens") is not None else "unknown"),
        ("Training data", f"{data['n_documents']:,} documents, {data['n_tokens']:,} tokens" if data else "unknown"),
        ("Data fingerprint", ", ".join(f"`{name}`" for name in data["train"]) if data else "unknown"),
        ("Tokenizer fingerprint", f"`{data['tokenizer']['fingerprint']}`" if data else "unknown"),
        ("Checkpoint", f"`{checkpoint.path.name}`"),
        *additions.facts,
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
        *([SOFT_CAP_NOTE, ""] if config.attention_logit_softcapping is not None else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        *(line for section in additions.sections for line in (section, "")),
        *(["## Tokenizer", "", *notes, ""] if notes else []),
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
    """The run's settings without local paths."""
    out = {k: v for k, v in config.items() if k not in ("out_dir", "resume", "resume_allow", "init_from")}
    out["data"] = {k: v for k, v in config["data"].items() if k not in ("train", "val")}
    return out


def import_from_hf(source: Path, output: Path) -> KnownTokenizer:
    """Write a Hugging Face folder as a checkpoint file, for --init_from. A failed attempt leaves nothing behind.

    Returns the tokenizer recorded in the checkpoint, if the folder has one.
    """
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    if not is_hf_folder(source):
        raise FileNotFoundError(f"{source} is no Hugging Face folder: it has no config.json")
    config, tensors = read_folder(source)
    tokenizer = of_files(find_tokenizer(source))
    meta: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": 0, "model_config": config.to_dict()}
    meta |= {"source": source.resolve().name, "tokenizer": tokenizer.facts_to_keep()}
    if (bos_id := encoding_of(source, tokenizer.opened).bos_id) is not None:
        meta["encoding"] = {"bos_id": bos_id}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(output) as temporary, open(temporary, "wb") as f:
        torch.save({"model": dict(tensors), "optimizer": {}, "meta": json.dumps(meta)}, f)
    return tokenizer
