"""How text is encoded for a model: whether documents start with BOS, and how special tokens in text are treated.

Recorded in the training data's manifest and in each checkpoint; everything that encodes text follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.hf_export import begins_with_bos, declared_bos, parses_special_tokens
from lit_data.tokenizers.tokenizer import Tokenizer
from lit_eval.model.model_tokenizer import of_model
from lit_files.reading import as_object, build, check_unicode
from lit_model.load import Checkpoint, is_hf_folder, resolve


def check_bos(named: Sequence[tuple[str, PackedDataset]]) -> None:
    """Check that all datasets (with their flags) agree on whether documents start with BOS. Raises ValueError."""
    first_flag, first = named[0]
    for flag, dataset in named[1:]:
        if dataset.manifest.bos_id != first.manifest.bos_id:
            raise ValueError(
                f"{flag} {dataset.path}: documents begin {_beginning(dataset.manifest.bos_id)}, those of {first_flag} "
                f"{first.path} {_beginning(first.manifest.bos_id)}: prepare both with --bos, or both without"
            )


def _beginning(id: int | None) -> str:
    return "with their text" if id is None else f"with BOS (id {id})"


def unlike_special_tokens(datasets: Sequence[PackedDataset]) -> str | None:
    """A warning if datasets treat special tokens in their text differently; None if they agree."""
    kinds = [dataset.manifest.special_tokens for dataset in datasets]
    if len(set(kinds)) < 2:
        return None
    parsed, plain = (datasets[kinds.index(kind)].path for kind in ("parse", "text"))
    return (
        f"{parsed} was prepared with --special_tokens parse, {plain} with text: names of special tokens are single ids "
        "in the one and text in the other"
    )


def encoding_facts(datasets: Sequence[PackedDataset]) -> dict[str, Any]:
    """How the training data was encoded, for a checkpoint's meta: `bos_id` if documents start with BOS, and
    `special_tokens` if they were parsed in all datasets ("parse") or in some ("mixed")."""
    facts: dict[str, Any] = {}
    if (bos_id := datasets[0].manifest.bos_id) is not None:
        facts["bos_id"] = bos_id
    kinds = {dataset.manifest.special_tokens for dataset in datasets}
    if kinds != {"text"}:
        facts["special_tokens"] = "parse" if kinds == {"parse"} else "mixed"
    return facts


@dataclass(frozen=True)
class Encoding:
    """How text is encoded for one model.

    Attributes:
        bos_id: the id every text starts with; None: no BOS.
        special_tokens: special tokens in text are plain `text`, or were `parse`d in all or some (`mixed`) of the data;
            None: unknown, since the model was not trained here.
    """

    bos_id: int | None = None
    special_tokens: Literal["text", "parse", "mixed"] | None = None


def encoding_of(path: Path, tokenizer: Tokenizer | None) -> Encoding:
    """How to encode text for a model: for a checkpoint, like its training data; for a Hugging Face folder, by its
    tokenizer's default; for a checkpoint imported from one, as recorded on import."""
    path = resolve(path)
    if is_hf_folder(path):
        if tokenizer is None:
            return Encoding()
        bos_id = tokenizer.bos_id if begins_with_bos(tokenizer) else None
        return Encoding(bos_id, "parse" if parses_special_tokens(tokenizer) else "text")
    meta, source = Checkpoint(path).meta, f"{path}: its meta"
    data = meta.get("data")
    if data is None:
        return build(Encoding, meta.get("encoding") or {}, source)
    known = {name: value for name, value in as_object(data, source).items() if name in ("bos_id", "special_tokens")}
    return build(Encoding, {"special_tokens": "text", **known}, source)


def unlike_start(path: Path, dataset: PackedDataset) -> str | None:
    """A warning if the --init_from model and the data disagree on BOS; None if they agree or that is unknown."""
    model = encoding_of(path, of_model(path).opened)
    ours, theirs = dataset.manifest.bos_id, model.bos_id
    if (ours is None) == (theirs is None) or model == Encoding():
        return None
    advice = "prepare the data with --bos" if ours is None else "prepare the data without --bos"
    return (
        f"--init_from {path} knows texts that begin {_beginning(theirs)}, and documents of {dataset.path} begin "
        f"{_beginning(ours)}: to train it as it was, {advice}"
    )


def check_folder(run: Path, folder: Path, tokenizer: Tokenizer, validation: PackedDataset) -> None:
    """Check that validation data and a converted folder use BOS as a run's training data did. Raises ValueError."""
    trained, converted = encoding_of(run, None).bos_id, encoding_of(folder, tokenizer).bos_id
    if validation.manifest.bos_id != trained:
        raise ValueError(
            f"{validation.path}: documents begin {_beginning(validation.manifest.bos_id)}, those that {run} was "
            f"trained on {_beginning(trained)}: the dataset was replaced"
        )
    if converted != trained:
        raise ValueError(
            f"{folder}: its tokenizer begins texts {_beginning(converted)}, and {run} was trained on documents that "
            f"begin {_beginning(trained)}: convert it again"
        )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], encoding: Encoding) -> list[list[int]]:
    """Ids of texts, without BOS."""
    parse = encoding.special_tokens in ("parse", "mixed")
    encoded = [ids.tolist() for ids in (tokenizer.encode_parsed if parse else tokenizer.encode_batch)(texts)]
    bos = encoding.bos_id
    return [ids[1:] if bos is not None and ids[:1] == [bos] else ids for ids in encoded]


def first_token(tokenizer: Tokenizer, encoding: Encoding) -> int:
    """The token that lm-evaluation-harness puts before a text to score, given the exported model: the BOS that its
    tokenizer names, or else its EOS."""
    bos = declared_bos(tokenizer, encoding.bos_id is not None)
    return tokenizer.eos_id if bos is None else bos


def encode_prompt(tokenizer: Tokenizer, text: str, encoding: Encoding) -> list[int]:
    """Token ids of a prompt, starting with BOS if the model expects it. Never empty: without BOS, an empty prompt
    becomes EOS, which in training precedes each document. Raises ValueError for what is no Unicode text."""
    try:
        check_unicode(text)
    except ValueError as error:
        raise ValueError(f"the prompt {text!r:.80}: {error}") from None
    parse = encoding.special_tokens in ("parse", "mixed")
    encoded = tokenizer.encode_parsed([text])[0] if parse else tokenizer.encode(text)
    ids: list[int] = encoded.tolist()
    if encoding.bos_id is not None and ids[:1] != [encoding.bos_id]:
        return [encoding.bos_id, *ids]
    return ids or [tokenizer.eos_id]
