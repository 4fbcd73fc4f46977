"""A trained model opened for evaluation, with its tokenizer, the encoding of its training data, and facts about it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_data.tokenizers.hf_export import names_bos
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_eval.model.choices import Prefix
from lit_eval.model.likelihood import Scorer, score_targets
from lit_eval.model.model_tokenizer import check_own_tokenizer, find_tokenizer, ids_without_token
from lit_eval.model.text_encoder import AlignedEncoder, TextEncoder
from lit_eval.model.text_encoding import Encoding, encode_texts, encoding_of, first_token
from lit_files.checkpoint_name import checkpoint_step
from lit_model.bf16 import use_float32_products
from lit_model.checksum import tensor_checksum
from lit_model.config import ModelConfig
from lit_model.cost import count_parameters
from lit_model.device import best_kind
from lit_model.load import MODEL_PREFIX, Checkpoint, is_hf_folder, load_model, resolve
from lit_model.model import GPT

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ModelFacts:
    """Facts about the evaluated model, as a results file keeps them.

    Attributes:
        path: as given, made absolute.
        name: to show: the run's or folder's name, with the step if it is a checkpoint.
        step: optimizer steps done; None if unknown.
        tokens: tokens it was trained on, those of repeats included; None if unknown.
        words: the same in words, where the data's words were counted.
        parameters: without padding of the vocabulary.
        checksum: SHA-256 over its tensors, so that results of a replaced checkpoint are not taken for its own.
    """

    path: str
    name: str
    parameters: int
    checksum: str
    step: int | None = None
    tokens: int | None = None
    words: float | None = None


@dataclass
class EvalModel:
    """A model, and everything that evaluating it needs.

    Attributes:
        path: the checkpoint or Hugging Face folder that was read.
        model: in evaluation mode on `device`.
        tokenizer: its own, or the one that was given; None if there is none.
        encoding: how its training data was encoded.
        excluded_ids: ids of the vocabulary without a token, never to be sampled.
        dtype: of the computation; other than float32, by autocast.
        warnings: to show to the user.
    """

    path: Path
    model: GPT
    config: ModelConfig
    tokenizer: Tokenizer | None
    encoding: Encoding
    excluded_ids: Sequence[int]
    device: torch.device
    dtype: torch.dtype = torch.float32
    warnings: list[str] = field(default_factory=list)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError if the model has none."""
        if self.tokenizer is None:
            raise ValueError(f"{self.path} has no tokenizer files: give --tokenizer FOLDER")
        return self.tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without BOS; special tokens in the text as in the training data."""
        return encode_texts(self.need_tokenizer(), texts, self.encoding)

    def encode_aligned(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text as by `encode`, and the end of each token in the text, in characters."""
        parse = self.encoding.special_tokens in ("parse", "mixed")
        ids, ends = self.need_tokenizer().encode_aligned(text, parse)
        begun = self.encoding.bos_id is not None and ids[:1] == [self.encoding.bos_id]
        return (ids[1:], ends[1:]) if begun else (ids, ends)

    def prefix_id(self, prefix: Prefix = "auto") -> int | None:
        """The token before a text that nothing else precedes; None: none, its first token is not scored.

        `auto` is what lm-evaluation-harness takes for the exported model: the BOS that its tokenizer names, or else its
        EOS. A model trained on documents without BOS has seen neither at the beginning of a text. Raises ValueError for
        `bos` without one.
        """
        if prefix == "none":
            return None
        tokenizer = self.need_tokenizer()
        if prefix == "bos" and tokenizer.bos_id is None:
            raise ValueError(f"--prefix bos: the tokenizer of {self.path} has no beginning-of-sequence token")
        if prefix == "auto" and not is_hf_folder(self.path):
            return first_token(tokenizer, self.encoding)
        return tokenizer.bos_id if prefix == "bos" or (prefix == "auto" and names_bos(tokenizer)) else tokenizer.eos_id

    def encoder(self, prefix: Prefix = "auto") -> TextEncoder:
        """How the model reads contexts and continuations. Raises as `prefix_id` does."""
        return TextEncoder(self.encode, self.encoding.bos_id, self.prefix_id(prefix))

    def aligned_encoder(self) -> AlignedEncoder:
        """How the model reads texts of which only a part is scored. Raises ValueError if it has no tokenizer."""
        return AlignedEncoder(self.encode_aligned, self.need_tokenizer().decode, self.encoding.bos_id)

    def autocast(self) -> Any:
        """The context in which to call `model`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scorer(self, batch_tokens: int = 16384, *, head: Any = score_targets, **options: Any) -> Scorer:
        """Scores token sequences. `head` computes the numbers of the targets; `options` are fields of Scorer."""

        def forward(tokens: Tensor, targets: Tensor) -> Tensor:
            with self.autocast():
                numbers: Tensor = self.model(tokens, targets, head=head)
            return numbers

        return Scorer(forward, self.config.block_size, batch_tokens, self.device, **options)

    @cached_property
    def facts(self) -> ModelFacts:
        """See ModelFacts. Reads all weights, for their checksum."""
        meta = {} if is_hf_folder(self.path) else Checkpoint(self.path).meta
        step = checkpoint_step(self.path)
        run = self.path if step is None else self.path.parent
        name = run.resolve().name + (f" step {step}" if step is not None else "")
        tokens, words = meta.get("tokens"), meta.get("words")
        return ModelFacts(
            path=str(self.path.resolve()),
            name=name,
            parameters=count_parameters(self.config),
            checksum=model_checksum(self.model),
            step=step if step is not None else meta.get("step"),
            tokens=tokens if isinstance(tokens, int) else None,
            words=float(words) if isinstance(words, (int, float)) else None,
        )


def open_model(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    precision: str = "fp32",
) -> EvalModel:
    """Open a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder.

    Args:
        tokenizer: folder or file; by default the model's own.
        device: a torch device; by default `cuda` where there is one.
        precision: `fp32`, or `bf16` or `fp16` by autocast.

    Raises ValueError or FileNotFoundError that names the path and the fault.
    """
    path = resolve(path)
    warnings: list[str] = []
    found = Path(tokenizer) if tokenizer is not None else find_tokenizer(path)
    opened = open_tokenizer(found) if found is not None else None
    if tokenizer is not None:
        try:
            check_own_tokenizer(path, Path(tokenizer))
        except ValueError as error:
            warnings.append(str(error))
    try:
        place = torch.device(device if device is not None else best_kind())
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    model, config = load_model(path)
    use_float32_products(model.blocks(), place, PRECISIONS[precision])
    return EvalModel(
        path=path,
        model=model.to(place, torch.float32),
        config=config,
        tokenizer=opened,
        encoding=encoding_of(path, opened),
        excluded_ids=ids_without_token(path, opened, config.vocab_size),
        device=place,
        dtype=PRECISIONS[precision],
        warnings=warnings,
    )


def model_checksum(model: GPT) -> str:
    """SHA-256 (hex) over names and values of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor_checksum(tensor)};".encode())
    return digest.hexdigest()


def recorded_checksum(path: Path) -> str | None:
    """`model_checksum` from the checksums that a checkpoint of one file carries, without reading its tensors; None
    where it cannot be known that way."""
    if is_hf_folder(path):
        return None
    checkpoint = Checkpoint(path)
    known = checkpoint.meta.get("checksums")
    if checkpoint.sharded or not isinstance(known, dict):
        return None
    digest = hashlib.sha256()
    for name in sorted(checkpoint.model_layout()):
        if checkpoint.layout(MODEL_PREFIX + name).dtype != torch.float32 or MODEL_PREFIX + name not in known:
            return None
        digest.update(f"{name}:{known[MODEL_PREFIX + name]};".encode())
    return digest.hexdigest()
