"""Frozen teachers: loading, checks against the student's data, and predictions for a micro-batch.

Dimensions: B rows in a micro-batch, T tokens in a row, P pieces of a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_data.packed.reader import PackedDataset
from lit_eval.model.model_tokenizer import OVERRIDE, check_model_and_data
from lit_files.checksum import file_sha256
from lit_model.bf16 import use_float32_products
from lit_model.config import ModelConfig
from lit_model.cost import count_parameters, largest_block, root_parameters
from lit_model.distillation import Teacher, TeacherHead
from lit_model.dtensor import is_dtensor
from lit_model.init import copy_slice
from lit_model.load import is_hf_folder, load_tensors
from lit_model.model import GPT
from pretrain.args import DistillationArgs, RunArgs
from pretrain.compiling import compile_blocks
from pretrain.parallel import DTYPES


def check_teachers(args: RunArgs, config: ModelConfig, dataset: PackedDataset, block_size: int) -> None:
    """Check that all teachers are usable. Raises ValueError or FileNotFoundError naming the unusable one and why.

    Reads configs, tokenizers, and tensor names and shapes; no weights.
    """
    top_k = args.distillation.top_k
    if top_k is not None and top_k > config.vocab_size:
        raise ValueError(f"--distillation.top_k {top_k} exceeds the vocabulary of {config.vocab_size}")
    for entry in args.distillation.teachers:
        where = f"--distillation.teachers {entry.path}"
        check_teacher(entry.path, config.vocab_size, block_size, where)
        if not args.data.allow_tokenizer_mismatch:
            check_tokenizer(entry.path, dataset, where)


def check_teacher(path: Path, vocab_size: int, block_size: int, where: str) -> None:
    """Check that a teacher has the student's vocabulary and a long enough context. Raises ValueError."""
    teacher, _ = load_tensors(path)
    if teacher.vocab_size != vocab_size:
        raise ValueError(
            f"{where} has a vocabulary of {teacher.vocab_size} ids, the student (or the first teacher) one of "
            f"{vocab_size}: both must be the tokenizer's"
        )
    if block_size > teacher.block_size:
        raise ValueError(
            f"{where} has a context of {teacher.block_size} tokens, less than a row's {block_size}: use shorter rows"
        )


def check_tokenizer(path: Path, dataset: PackedDataset, where: str, override: str = OVERRIDE) -> None:
    """Check that a teacher was trained with the data's tokenizer. Raises ValueError, also if that is unknown."""
    unknown = check_model_and_data(path, dataset, where, override=override)
    if unknown is not None:
        raise ValueError(f"{unknown}. Put the tokenizer beside it, or override with {override}")


def identify(paths: Sequence[Path], weights: Sequence[float]) -> list[dict[str, Any]]:
    """Identity of each teacher, a checkpoint or Hugging Face folder: name, one checksum over its files, and weight."""
    found = []
    for path, weight in zip(paths, weights, strict=True):
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        if is_hf_folder(path):
            files = [p for p in files if p.suffix in (".safetensors", ".bin") or p.name == "config.json"]
        sums = "\n".join(file_sha256(p) for p in files)
        name = path.name if is_hf_folder(path) else f"{path.absolute().parent.name}/{path.name}"
        found.append({"name": name, "sha256": hashlib.sha256(sums.encode()).hexdigest(), "weight": weight})
    return found


def teacher_precision(d: DistillationArgs, run_precision: str) -> str:
    """Precision of the teachers' weights and arithmetic: fp32 or bf16."""
    return d.teacher_precision or ("fp32" if run_precision == "fp32" else "bf16")


def teacher_bytes(d: DistillationArgs, run_precision: str, kind: str, world_size: int) -> int:
    """Bytes of teacher weights on one training device of this kind (cpu, cuda)."""
    elsewhere = d.teacher_device is not None and not torch.device(d.teacher_device).type == kind == "cpu"
    n_parameters = 0
    for entry in d.teachers:
        config, _ = load_tensors(entry.path)
        if elsewhere:  # the head is copied over for the loss
            n_parameters += config.padded_vocab_size * config.n_embd
        elif d.shard_teachers:  # the root stays unsharded, plus one gathered block
            root, block = root_parameters(config), largest_block(config)
            n_parameters += root + (count_parameters(config) - root) // world_size + block
        else:
            n_parameters += count_parameters(config)
    return n_parameters * DTYPES[teacher_precision(d, run_precision)].itemsize


class Teachers:
    """The ensemble on its devices. Every rank holds all of it, or its shard with `shard_teachers`."""

    def __init__(self, d: DistillationArgs, run_precision: str, device: torch.device) -> None:
        self.device = torch.device(d.teacher_device) if d.teacher_device is not None else device
        self.student_device = device
        self.precision = teacher_precision(d, run_precision)
        self.sharded = d.shard_teachers
        total = sum(entry.weight for entry in d.teachers)
        self.shares = [entry.weight / total for entry in d.teachers]
        self.models = [self._open(entry.path, d.compile_teachers) for entry in d.teachers]

    def _open(self, path: Path, compiled: bool) -> GPT:
        config, tensors = load_tensors(path)
        with torch.device("meta"):
            model = GPT(config).to(DTYPES[self.precision])
        use_float32_products(model.blocks(), self.device, DTYPES[self.precision])
        model.requires_grad_(False).eval()
        if compiled:
            compile_blocks(model)
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks():
                fully_shard(block)
            fully_shard(model, reshard_after_forward=False)  # the student's loss reads the head after the forward
        model.to_empty(device=self.device)
        for name, parameter in model.named_parameters():
            copy_slice(parameter, tensors[name])
        return model

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> list[Teacher]:
        """Run each on a micro-batch: tokens int64 (B, T), boundaries int32 (P + 1,), on the student's device."""
        lasting = self.device.type != "cpu"  # an async copy to the host could be read too early
        here = tokens.to(self.device, non_blocking=lasting)
        bounds = None if cu_seqlens is None else cu_seqlens.to(self.device, non_blocking=lasting)
        # FSDP's hooks read version counters of gathered tensors; inference tensors have none.
        quiet = torch.no_grad() if self.sharded else torch.inference_mode()
        predictions = []
        with quiet, torch.autocast(self.student_device.type, enabled=False):
            for model, share in zip(self.models, self.shares, strict=True):
                teacher = model(here, cu_seqlens=bounds, head=TeacherHead(share))
                assert isinstance(teacher, Teacher)
                predictions.append(self._for_student(teacher))
        return predictions

    def _for_student(self, teacher: Teacher) -> Teacher:
        assert not is_dtensor(teacher.weight), "a head must be whole"

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.student_device, non_blocking=True)

        bias = None if teacher.bias is None else moved(teacher.bias)
        return teacher._replace(hidden=moved(teacher.hidden), weight=moved(teacher.weight), bias=bias)
