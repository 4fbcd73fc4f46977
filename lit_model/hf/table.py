"""Tensors in Hugging Face's names and ours: the transforms, and both directions, one tensor at a time.

Dimensions: C n_embd, H heads, G query groups, D head size, R rotated dimensions of a head, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_model.config import ModelConfig
from lit_model.hf.family import Entry, Family, Transform
from lit_model.model import parameter_shapes

# Put before or into names by torch.compile, DDP, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Ours whose first dimension is the padded vocabulary.
VOCABULARY = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")

# --- Transforms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneToOne:
    """One tensor of ours is one of theirs; `there` and `back` are inverses."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]

    def to_theirs(self, tensor: Tensor) -> Sequence[Tensor]:
        return (self.there(tensor),)

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        (tensor,) = parts
        return self.back(tensor)


SAME = OneToOne(lambda tensor: tensor, lambda tensor: tensor)
# The last two dimensions change places: GPT-2's linears (in, out), Llama 4's experts (E, in, out).
TRANSPOSED = OneToOne(lambda t: t.mT if t.dim() > 1 else t, lambda t: t.mT.contiguous() if t.dim() > 1 else t)


def head_by_head(n_head: int) -> OneToOne:
    """Rows q of all heads, k of all heads, v of all heads <-> q, k, v of the first head, of the second (GPT-NeoX)."""

    def swapped(tensor: Tensor, sizes: tuple[int, int]) -> Tensor:
        """Rows (a, b, rest) -> (b, a, rest) for sizes (a, b)."""
        parts: Tensor = tensor.unflatten(0, (*sizes, -1))
        return parts.transpose(0, 1).flatten(0, 2)

    return OneToOne(lambda tensor: swapped(tensor, (3, n_head)), lambda tensor: swapped(tensor, (n_head, 3)))


def interleaved(n_head: int, rotary_size: int) -> OneToOne:
    """Rows of queries or keys: ours rotate dimension i of a head with i + R/2, theirs 2 i with 2 i + 1 (GPT-J).

    A permutation within the first R rows of each head, the same for queries and keys, so that scores do not change.
    """

    def permuted(tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
        heads: Tensor = tensor.unflatten(0, (n_head, -1))  # (H, D, ...)
        halves: Tensor = heads[:, :rotary_size].unflatten(1, pairs)
        rotated = halves.transpose(1, 2).flatten(1, 2)  # (H, R, ...)
        return torch.cat((rotated, heads[:, rotary_size:]), dim=1).flatten(0, 1)

    half = rotary_size // 2
    return OneToOne(lambda tensor: permuted(tensor, (2, half)), lambda tensor: permuted(tensor, (half, 2)))


@dataclass(frozen=True)
class Rows:
    """Rows cut into parts of these sizes, as many as there are names of theirs; `each` is then applied to its part."""

    sizes: tuple[int, ...]
    each: tuple[Transform, ...] = ()

    def to_theirs(self, tensor: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = torch.split(tensor, list(self.sizes))
        if self.each:
            parts = tuple(one.to_theirs(part)[0] for one, part in zip(self.each, parts, strict=True))
        return parts

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        if self.each:
            parts = tuple(one.to_ours((part,)) for one, part in zip(self.each, parts, strict=True))
        return torch.cat(tuple(parts))


def qkv_rows(config: ModelConfig, *, pairs: bool = False) -> Rows:
    """Our fused projection cut into those of queries, keys and values; `pairs`: theirs rotate neighbouring rows."""
    H, G, D, R = config.n_head, config.n_query_groups, config.head_size, config.rotary_size
    return Rows((H * D, G * D, G * D), (interleaved(H, R), interleaved(G, R), SAME) if pairs else ())


# --- Rows of a family's table ----------------------------------------------------------------------------------------


def entries_of(family: Family, config: ModelConfig) -> Iterator[Entry]:
    """The family's table of names for a config, in the order of the family's modules."""
    shapes = parameter_shapes(config)

    def module(ours: str, theirs: tuple[str, ...], transform: Transform | None = None) -> Iterator[Entry]:
        for kind in (".weight", ".bias", ""):
            if ours + kind in shapes:
                default = SAME if len(theirs) == 1 else qkv_rows(config)
                yield Entry(ours + kind, tuple(name + kind for name in theirs), transform or default)

    for ours, theirs in family.names.items():
        for i in range(config.n_layer if ours == "transformer.h" else 0):
            transforms = family.transforms(config, i)
            for name, their in family.block.items():
                inner = tuple(f"{theirs}.{i}.{one}" for one in ([their] if isinstance(their, str) else their))
                yield from module(f"{ours}.{i}.{name}", inner, transforms.get(name))
        yield from module(ours, (theirs,))


# --- Names in files ---------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A parameter's name without the parts added by wrappers."""
    name = _WRAPPERS.sub("", name)
    return name.removeprefix("module.")


def _their_name(name: str, wanted: Set[str], prefix: str) -> str:
    """The name in `wanted` that a name in a file means, with or without the family's prefix; itself if none."""
    plain = plain_name(name)
    return next((each for each in (plain, prefix + plain, plain.removeprefix(prefix)) if each in wanted), name)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


# --- Both directions -------------------------------------------------------------------------------------------------


def tensors_to_hf(family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and tensors from ours, one at a time; padding rows of the vocabulary are dropped.

    `tensors` may load lazily on item access; each is released before the next is requested. Raises ValueError naming
    missing, unknown or misshapen ones.
    """
    shapes = parameter_shapes(config)
    check_names(shapes, tensors, "the checkpoint")
    for ours, theirs, transform in entries_of(family, config):
        tensor = tensors[ours]
        if tuple(tensor.shape) != shapes[ours]:
            raise ValueError(f"{ours} has shape {tuple(tensor.shape)}; the config implies {shapes[ours]}")
        if ours in VOCABULARY:
            tensor = tensor[: config.vocab_size]
        yield from zip(theirs, transform.to_theirs(tensor), strict=True)
        del tensor  # before the next one is read


def tensors_from_hf(
    family: Family, config: ModelConfig, tensors: Mapping[str, Tensor], where: str = "the Hugging Face folder"
) -> Mapping[str, Tensor]:
    """A mapping from our names that builds each tensor when asked for it; the inverse of `tensors_to_hf`.

    Names are taken as transformers takes them: with the family's prefix or without. Those that wrappers changed, which
    transformers would replace by random weights, are read too. Of a tied model either matrix may be stored, or both if
    they are equal. Buffers of old files are passed over. Padding rows are zeros: they get no probability and no
    gradient. Raises ValueError naming missing, unknown or repeated tensors at once, misshapen ones on access.

    Args:
        where: the source of the tensors, for error messages.
    """
    if config.n_layer > len(tensors):  # before a model of so many layers is laid out
        raise ValueError(f"{where} holds {len(tensors)} tensors, too few for a model of {config.n_layer} layers")
    entries = {entry.ours: entry for entry in entries_of(family, config)}
    shapes = parameter_shapes(config)
    assert entries.keys() == shapes.keys(), sorted(entries.keys() ^ shapes.keys())
    wanted = {their for entry in entries.values() for their in entry.theirs} | {family.head}
    stored: dict[str, str] = {}
    for name in tensors:
        if family.is_buffer(name):
            continue
        their = _their_name(name, wanted, family.prefix)
        if their in stored:
            raise ValueError(f"{where} holds both {stored[their]} and {name}, which are one parameter")
        stored[their] = name
    if config.tie_embeddings:
        (embedding,) = entries["transformer.wte.weight"].theirs
        head = stored.pop(family.head, None)
        if head is not None and not _same(tensors[head], tensors[stored.setdefault(embedding, head)]):
            raise ValueError(
                f"{where}: tie_word_embeddings is true, yet {head} differs from {stored[embedding]}; if the head is a "
                "matrix of its own, set it to false in config.json"
            )
        wanted.discard(family.head)
    check_names(wanted, {their if their in wanted else name for their, name in stored.items()}, where)

    def build(ours: str) -> Tensor:
        _, theirs, transform = entries[ours]
        parts = [tensors[stored[their]] for their in theirs]
        try:
            tensor = transform.to_ours(parts)
        except RuntimeError:  # of no shape that can be cut or joined as the family does
            tensor = None
        if tensor is not None and ours in VOCABULARY and tensor.shape[0] == config.vocab_size:
            padding = config.padded_vocab_size - config.vocab_size
            if padding:
                tensor = torch.cat((tensor, tensor.new_zeros(padding, *tensor.shape[1:])))
        if tensor is None or tuple(tensor.shape) != shapes[ours]:
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            names = " + ".join(theirs)
            raise ValueError(f"{where}: {names} give shape {found}; the config implies {shapes[ours]} ({ours})")
        return tensor

    return LazyTensors(entries, build)


class LazyTensors(Mapping[str, Tensor]):
    """A read-only mapping whose tensors are built on access and not kept."""

    def __init__(self, names: Any, build: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._build = build

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._build(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_names(wanted: Any, found: Any, where: str) -> None:
    """Raise ValueError naming missing and unknown names."""
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        parts = [
            f"{label} {first_names(names)}" for label, names in (("lacks", missing), ("has unknown", unknown)) if names
        ]
        raise ValueError(f"{where} does not fit the config: it {' and '.join(parts)}")


def first_names(names: list[str]) -> str:
    """The first five names and the number of others, for messages."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
