"""Finds the tokenizer a model was trained with, and compares it with the data's.

A model only makes sense with its tokenizer. A run's checkpoint records it (`meta["data"]["tokenizer"]`), as does an
imported one (`meta["tokenizer"]`) if it had one; a Hugging Face folder has it next to the model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.compare import difference, ids_digest
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_files.checkpoint_name import checkpoint_step
from lit_model.load import Checkpoint, is_hf_folder, resolve

OVERRIDE = "--data.allow_tokenizer_mismatch true"


@dataclass(frozen=True)
class KnownTokenizer:
    """Known facts about a tokenizer.

    Attributes:
        facts: from `Tokenizer.facts`, possibly with `ids_digest`; empty if nothing is known.
        files: its folder or file, if available; may turn out to be a different tokenizer.
        unreadable: why the files could not be read.
    """

    facts: dict[str, Any]
    files: Path | None = None
    unreadable: str | None = None

    @property
    def fingerprint(self) -> str | None:
        return self.facts.get("fingerprint")

    @property
    def named(self) -> bool:
        """Whether the tokenizer is identified: data imported without one only records the number of ids."""
        return self.fingerprint is not None and self.facts.get("kind") != "unknown"

    @functools.cached_property
    def opened(self) -> Tokenizer | None:
        """The tokenizer itself, if its files are available and match the facts."""
        if self.files is None:
            return None
        try:
            tokenizer = open_tokenizer(self.files)
        except (ValueError, OSError):
            return None
        return tokenizer if tokenizer.fingerprint == self.fingerprint else None

    @functools.cached_property
    def digest(self) -> str | None:
        if "ids_digest" in self.facts:
            return str(self.facts["ids_digest"])
        return ids_digest(self.opened) if self.opened is not None else None

    def facts_to_keep(self) -> dict[str, Any]:
        """The facts for an imported checkpoint, which has no tokenizer files beside it."""
        return {**self.facts, "ids_digest": self.digest} if self.facts else {}


def find_tokenizer(path: Path) -> Path | None:
    """Find the tokenizer of a run folder, a checkpoint in one, or a Hugging Face folder; None if there is none."""
    path = Path(path)
    if is_hf_folder(path):
        has_files = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return path if has_files else None
    run = path.parent if path.is_file() or checkpoint_step(path) is not None else path
    return run / "tokenizer" if (run / "tokenizer").is_dir() else None


def of_files(path: Path | None) -> KnownTokenizer:
    """The tokenizer in a folder or file. One that cannot be opened counts as unknown, with the reason."""
    if path is None:
        return KnownTokenizer({})
    try:
        return KnownTokenizer(open_tokenizer(path).facts(), path)
    except (ValueError, OSError) as error:
        return KnownTokenizer({}, unreadable=str(error))


def of_model(path: Path) -> KnownTokenizer:
    """The tokenizer of a run folder, checkpoint or Hugging Face folder. Raises as `resolve` and `Checkpoint` do."""
    path = resolve(path)
    if is_hf_folder(path):
        return of_files(find_tokenizer(path))
    return KnownTokenizer(facts_of(Checkpoint(path).meta), find_tokenizer(path))


def of_data(dataset: PackedDataset) -> KnownTokenizer:
    return KnownTokenizer(dataset.manifest.tokenizer, dataset.tokenizer_folder)


def facts_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer facts in a checkpoint's meta; empty if there are none."""
    data = meta.get("data")
    facts = (data.get("tokenizer") if isinstance(data, dict) else None) or meta.get("tokenizer")
    return facts if isinstance(facts, dict) else {}


def ids_without_token(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Ids in a model's vocabulary without a token: beyond the tokenizer's range, or unused by it. They are untrained.

    `tokenizer` None: use the model's own, if its checkpoint records how many ids it has.
    """
    if tokenizer is not None:
        return [id for id in range(vocab_size) if tokenizer.id_to_token(id) is None]
    return list(range(of_model(path).facts.get("vocab_size", vocab_size), vocab_size))


def compare(one: KnownTokenizer, other: KnownTokenizer) -> Literal["same", "different", "unknown"]:
    """Whether two produce the same ids: by fingerprint, else by behaviour; see lit_data/tokenizers/compare.py."""
    if one.fingerprint is not None and one.fingerprint == other.fingerprint:
        return "same"
    if not (one.named and other.named):
        return "unknown"
    return "same" if one.digest is not None and one.digest == other.digest else "different"


def describe_difference(one: KnownTokenizer, other: KnownTokenizer, whose: str) -> str:
    """Describe how two known tokenizers differ. `whose` names the owner of the other one."""
    how = f"its fingerprint is {str(one.fingerprint)[:12]}, that of {whose} is {str(other.fingerprint)[:12]}"
    if one.opened is not None and other.opened is not None:
        return f"{how} ({difference(one.opened, other.opened)})"
    sizes = one.facts.get("vocab_size"), other.facts.get("vocab_size")
    return how if sizes[0] == sizes[1] else f"{how}; they have {sizes[0]} and {sizes[1]} ids"


def check_model_and_data(path: Path, dataset: PackedDataset, where: str, *, override: str = OVERRIDE) -> str | None:
    """Check that a model was trained with the data's tokenizer.

    Returns None if it was, and a warning if that is unknown. Raises ValueError naming the difference.

    Args:
        where: the flag and the model, for messages.
        override: the flag that allows a difference.
    """
    model, data = of_model(path), of_data(dataset)
    verdict = compare(model, data)
    if verdict == "different":
        raise ValueError(
            f"{where} was trained with another tokenizer: {describe_difference(model, data, str(dataset.path))}. "
            f"Prepare the data with the model's, or, if you know that ids mean the same, override with {override}"
        )
    if verdict == "same":
        return None
    if model.named:
        return f"{dataset.path} does not say which tokenizer made it: make sure that it is that of {where}"
    why = f" ({model.unreadable})" if model.unreadable else ""
    return f"{where} does not say which tokenizer it was trained with{why}: make sure that it is that of {dataset.path}"


def check_own_tokenizer(path: Path, tokenizer: Path | None) -> None:
    """Check that a tokenizer is the one a model was trained with, if that is known. Raises ValueError."""
    model, given = of_model(path), of_files(tokenizer)
    if compare(model, given) == "different":
        raise ValueError(
            f"{tokenizer} is not the tokenizer that {path} was trained with: "
            f"{describe_difference(model, given, str(tokenizer))}"
        )
