"""The tokenizer that a model was trained with, and whether it is that of the data.

The meaning of ids is part of a model. A checkpoint of a run states it (`meta["data"]["tokenizer"]`), as does an
imported one (`meta["tokenizer"]`) if it had a tokenizer; a Hugging Face folder has it beside the model.
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
    """A tokenizer, as far as it is known.

    Attributes:
        facts: of `Tokenizer.facts`, perhaps with `ids_digest`; empty if nothing is known.
        files: its folder or file, if it is at hand; it may turn out to be another one.
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
        """Whether it is known at all: data that came without a tokenizer says only how many ids it has."""
        return self.fingerprint is not None and self.facts.get("kind") != "unknown"

    @functools.cached_property
    def opened(self) -> Tokenizer | None:
        """The tokenizer itself, if its files are at hand and are those that the facts are of."""
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
    """The tokenizer of a run folder, of a checkpoint in one, or of a Hugging Face folder; None if there is none."""
    path = Path(path)
    if is_hf_folder(path):
        has_files = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return path if has_files else None
    run = path.parent if path.is_file() or checkpoint_step(path) is not None else path
    return run / "tokenizer" if (run / "tokenizer").is_dir() else None


def of_files(path: Path | None) -> KnownTokenizer:
    """Of a tokenizer's folder or file. One that cannot be opened is not known, with the reason."""
    if path is None:
        return KnownTokenizer({})
    try:
        return KnownTokenizer(open_tokenizer(path).facts(), path)
    except (ValueError, OSError) as error:
        return KnownTokenizer({}, unreadable=str(error))


def of_model(path: Path) -> KnownTokenizer:
    """Of a run folder, a checkpoint or a Hugging Face folder. Raises what `resolve` and `Checkpoint` raise."""
    path = resolve(path)
    if is_hf_folder(path):
        return of_files(find_tokenizer(path))
    return KnownTokenizer(facts_of(Checkpoint(path).meta), find_tokenizer(path))


def of_data(dataset: PackedDataset) -> KnownTokenizer:
    return KnownTokenizer(dataset.manifest.tokenizer, dataset.tokenizer_folder)


def facts_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The facts of the tokenizer in a checkpoint; empty if there are none."""
    data = meta.get("data")
    facts = (data.get("tokenizer") if isinstance(data, dict) else None) or meta.get("tokenizer")
    return facts if isinstance(facts, dict) else {}


def ids_without_token(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Ids of a model's vocabulary that no token has: above the tokenizer's, or left out by it. Nothing trained them.

    `tokenizer` None: the model's own counts, as far as its checkpoint says how many ids that has.
    """
    if tokenizer is not None:
        return [id for id in range(vocab_size) if tokenizer.id_to_token(id) is None]
    return list(range(of_model(path).facts.get("vocab_size", vocab_size), vocab_size))


def compare(one: KnownTokenizer, other: KnownTokenizer) -> Literal["same", "different", "unknown"]:
    """Whether two give the same ids: by fingerprint, else by what they do; see lit_data/tokenizers/compare.py."""
    if one.fingerprint is not None and one.fingerprint == other.fingerprint:
        return "same"
    if not (one.named and other.named):
        return "unknown"
    return "same" if one.digest is not None and one.digest == other.digest else "different"


def describe_difference(one: KnownTokenizer, other: KnownTokenizer, whose: str) -> str:
    """How two known tokenizers differ, as far as known. `whose` says what the other one is of."""
    how = f"its fingerprint is {str(one.fingerprint)[:12]}, that of {whose} is {str(other.fingerprint)[:12]}"
    if one.opened is not None and other.opened is not None:
        return f"{how} ({difference(one.opened, other.opened)})"
    sizes = one.facts.get("vocab_size"), other.facts.get("vocab_size")
    return how if sizes[0] == sizes[1] else f"{how}; they have {sizes[0]} and {sizes[1]} ids"


def check_model_and_data(path: Path, dataset: PackedDataset, where: str, *, override: str = OVERRIDE) -> str | None:
    """Check that a model was trained with the tokenizer of the data.

    Returns None if it was, and a sentence if that is unknown. Raises ValueError that names the difference.

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
        return f"{dataset.path} does not say which tokenizer made it: see that it is that of {where}"
    why = f" ({model.unreadable})" if model.unreadable else ""
    return f"{where} does not say which tokenizer it was trained with{why}: see that it is that of {dataset.path}"


def check_own_tokenizer(path: Path, tokenizer: Path | None) -> None:
    """Check that a tokenizer is the one a model was trained with, as far as known. Raises ValueError."""
    model, given = of_model(path), of_files(tokenizer)
    if compare(model, given) == "different":
        raise ValueError(
            f"{tokenizer} is not the tokenizer that {path} was trained with: "
            f"{describe_difference(model, given, str(tokenizer))}"
        )
