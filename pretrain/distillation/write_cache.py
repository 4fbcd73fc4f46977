"""Caches teacher predictions for a dataset; called by scripts/cache_teacher.py."""

from __future__ import annotations

import torch

from lit_data.loading.rows import open_rows
from lit_data.packed.reader import PackedDataset
from lit_model.device import best_kind
from lit_model.load import load_tensors, resolve
from pretrain.args import DistillationArgs, TeacherEntry
from pretrain.distillation.cache_request import CacheRequest
from pretrain.distillation.teacher_cache import CacheFacts, begin_cache, write_cache
from pretrain.distillation.teachers import Teachers, check_teacher, check_tokenizer, identify


def cache_teachers(request: CacheRequest) -> str:
    """Write this call's share of a cache, printing its size first. Returns a readable report.

    Raises:
        ValueError: the teachers don't match the data or each other, or the folder holds something else.
        OSError: a path does not exist or cannot be written.
    """
    device = torch.device(best_kind())
    precision = request.precision or ("bf16" if device.type == "cuda" else "fp32")
    weights = request.weights or [1.0] * len(request.teachers)
    entries = [TeacherEntry(resolve(path), weight) for path, weight in zip(request.teachers, weights, strict=True)]
    setting = DistillationArgs(entries, temperature=request.temperature, ensemble=request.ensemble)
    dataset = PackedDataset(request.data)
    vocab_size = load_tensors(entries[0].path)[0].vocab_size
    for entry in entries:
        where = f"--teachers {entry.path}"
        check_teacher(entry.path, vocab_size, request.block_size, where)
        if not request.allow_tokenizer_mismatch:
            check_tokenizer(entry.path, dataset, where, "--allow_tokenizer_mismatch")
    if request.k > vocab_size:
        raise ValueError(f"--k {request.k} exceeds the teachers' vocabulary of {vocab_size}")
    rows = open_rows(dataset, request.packing, request.block_size, request.plan_dir)
    facts = CacheFacts(
        dataset=dataset.fingerprint,
        packing=request.packing,
        block_size=request.block_size,
        document_mask=not request.no_document_mask,
        n_windows=rows.n_windows,
        vocab_size=vocab_size,
        teachers=identify([entry.path for entry in entries], weights),
        ensemble=request.ensemble,
        temperature=request.temperature,
        precision=precision,
        k=request.k,
        dtype=request.dtype,
        rows_per_file=request.rows_per_file,
    )
    begin_cache(request.output, facts)
    tokens = facts.n_windows * facts.block_size
    print(
        f"{facts.bytes_per_token} bytes per token, {facts.bytes_per_token * tokens / 1e9:.2f} GB in all, "
        f"{facts.n_files} files",
        flush=True,
    )
    teachers = Teachers(setting, precision, device)
    written, left = write_cache(request.output, facts, teachers, rows, request.batch, request.part, request.parts)
    elsewhere = f"; another call is writing {left}" if left else ""
    return f"{request.output}: {written} files written by part {request.part} of {request.parts}{elsewhere}"
