"""Distillation in the ordinary training loop: losses, resume, ranks, caches, errors."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parallel_configurations import column
from running import flags, kill_once, metrics, same_checkpoints, script, script_error, train, train_killed
from whole_record import read_record

from lit_data.loading.batches import read_rows
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order
from lit_data.loading.rows import ConcatRows
from lit_data.packed.reader import PackedDataset
from lit_files.mapping import live_maps
from lit_model.cost import count_parameters
from lit_model.load import load_model, load_tensors
from lit_model.registry import get_config
from pretrain.args import DistillationArgs
from pretrain.distillation.objective import alpha_at
from pretrain.distillation.teacher_cache import CachedTeacher, CacheFacts, begin_cache, read_facts
from pretrain.free_memory import show_bytes
from pretrain.init_from import with_layers

CHANGES: dict[str, object] = {"objective": "distillation", "train__max_steps": 6, "save__every_steps": 3}


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Llama and a GPT-2, each trained for a few steps."""
    folder = tmp_path_factory.mktemp("teachers")
    gpt2 = {
        "model__norm_class_name": "LayerNorm",
        "model__position_embedding": "learned",
        "model__mlp_gated": "false",
        "model__n_query_groups": 4,
        "model__n_embd": 48,
    }
    for name, changes in (("llama", {}), ("gpt2", gpt2)):
        train(*flags(data, folder / name, train__max_steps=4, seed=5, **changes))
    return [folder / "llama", folder / "gpt2"]


def entries(teachers: list[Path]) -> str:
    weights = (2.0, 1.0)
    return "[" + ", ".join(f"{{path: {t}, weight: {w}}}" for t, w in zip(teachers, weights, strict=False)) + "]"


@pytest.fixture(scope="module")
def student(data: Path, teachers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-process run with both teachers."""
    folder = tmp_path_factory.mktemp("student") / "one"
    train(*flags(data, folder, **CHANGES, distillation__teachers=entries(teachers), train__micro_batch_samples=4))
    return folder


def test_the_first_step_equals_the_formula(data: Path, teachers: list[Path], student: Path) -> None:
    """The first step's cross-entropy, divergence and their sum, compared with full logits in float64."""
    row = metrics(student)[1]
    rows = ConcatRows(PackedDataset(data / "train"), 32)
    _, _, windows = Mixture.single(Order(rows.n_windows, 1337, 0)).locate(np.arange(8))
    batch = read_rows(rows, windows, np.arange(8), document_mask=True)
    said = []
    with torch.no_grad():
        for teacher in teachers:
            said.append(load_model(teacher)[0](batch.tokens, cu_seqlens=batch.cu_seqlens).double())
        config, _ = load_tensors(student)
        fresh = student.parent / "fresh"
        if not fresh.exists():  # the student before its first step
            train(*flags(data, fresh, train__max_steps=1, optim__lr=1e-12, optim__lr_min=0, optim__warmup_steps=0))
        mine = load_model(fresh)[0](batch.tokens, cu_seqlens=batch.cu_seqlens).double()
    valid = batch.targets != -100
    z_t, z_s = ((2 * said[0] + said[1]) / 3)[valid], mine[valid]
    cross_entropy = F.cross_entropy(z_s, batch.targets[valid])
    divergence = F.kl_div((z_s / 2).log_softmax(-1), (z_t / 2).softmax(-1), reduction="sum") / len(z_s)
    assert config.vocab_size == z_s.shape[-1]
    for name, want in (
        ("train_loss", cross_entropy),
        ("divergence", divergence),
        ("total_loss", 0.5 * cross_entropy + 0.5 * 4 * divergence),
    ):
        assert float(row[name]) == pytest.approx(float(want), rel=1e-5), name
    assert column(student, "divergence")[-1] < column(student, "divergence")[0]


def test_alpha_one_equals_training_without_teachers(data: Path, teachers: list[Path], tmp_path: Path) -> None:
    train(*flags(data, tmp_path / "plain", train__max_steps=6, save__every_steps=3))
    taught = {"distillation__teachers": entries(teachers), "distillation__alpha": 1.0}
    train(*flags(data, tmp_path / "taught", **CHANGES, **taught))
    last = "iter-00000006-ckpt.pth"
    same_checkpoints(tmp_path / "plain" / last, tmp_path / "taught" / last)


def test_two_ranks_equal_one_and_resume_bit_for_bit(
    data: Path, teachers: list[Path], student: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "devices": 2, "strategy": "fsdp", "distillation__teachers": entries(teachers)}
    two, sharded = tmp_path / "two", tmp_path / "sharded"
    train(*flags(data, two, **changes))
    for name in ("train_loss", "divergence", "total_loss", "grad_norm", "val_loss"):
        torch.testing.assert_close(column(two, name), column(student, name), rtol=1e-5, atol=0)
    train(*flags(data, sharded, **changes, distillation__shard_teachers="true"))
    for name in ("train_loss", "divergence"):
        torch.testing.assert_close(column(sharded, name), column(student, name), rtol=1e-5, atol=0)
    train(*flags(data, two, **changes, resume="iter-00000003-ckpt.pth"))
    (before,) = two.glob("abandoned/*/iter-00000006-ckpt.pth")
    same_checkpoints(before, two / "iter-00000006-ckpt.pth")


def test_preflight_includes_the_teachers(data: Path, teachers: list[Path], tmp_path: Path) -> None:
    """In the memory estimate, and in its measured step."""
    taught = {**CHANGES, "distillation__teachers": entries(teachers)}
    done = train(*flags(data, tmp_path / "run", **taught), "--preflight")
    n_bytes = 4 * sum(count_parameters(load_tensors(t)[0]) for t in teachers)
    assert f", teachers {show_bytes(n_bytes)})" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_teachers_are_identified_by_content(data: Path, teachers: list[Path], student: Path, tmp_path: Path) -> None:
    """A resume accepts the same teachers under a new path, and refuses different ones under the old path."""
    run, moved = tmp_path / "run", [tmp_path / "moved" / t.name for t in teachers]
    shutil.copytree(student, run)
    for there, here in zip(teachers, moved, strict=True):
        shutil.copytree(there, here)
    changes = {**CHANGES, "train__micro_batch_samples": 4, "distillation__teachers": entries(moved)}
    done = train(*flags(data, run, **changes, resume="iter-00000003-ckpt.pth"))
    names = "teachers llama/iter-00000004-ckpt.pth x 2 + gpt2/iter-00000004-ckpt.pth x 1"
    assert f"{names}; forward_kl at temperature 2, per_token, alpha 0.5" in done.stdout
    same_checkpoints(student / "iter-00000006-ckpt.pth", run / "iter-00000006-ckpt.pth")
    train(*flags(data, moved[0], train__max_steps=5, seed=5, resume="auto", resume_allow="train.max_steps"))
    done = train(*flags(data, run, **changes, resume="iter-00000003-ckpt.pth"), check=False)
    assert done.returncode == 2
    there, here = (rf"\['llama/iter-0000000{step}-ckpt.pth \(\w{{12}}\) x 2', " for step in (4, 5))
    assert re.search(rf"distillation\.teachers: {there}.* there, {here}", done.stdout), done.stdout


@pytest.mark.slow
def test_teachers_in_bf16_beside_two_ranks_in_fp32(
    data: Path, teachers: list[Path], student: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "devices": 2, "strategy": "ddp", "distillation__teachers": entries(teachers)}
    changes |= {"distillation__teacher_precision": "bf16", "distillation__teacher_device": "cpu"}
    train(*flags(data, tmp_path / "run", **changes))
    low, full = column(tmp_path / "run", "divergence"), column(student, "divergence")
    torch.testing.assert_close(low, full, rtol=2e-2, atol=0)
    assert not torch.allclose(low, full, rtol=1e-6, atol=0), "the teachers were not in bf16"


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_student_resumes_bit_for_bit(data: Path, teachers: list[Path], tmp_path: Path, cached: bool) -> None:
    changes = {**CHANGES, "train__max_steps": 20, "save__every_steps": 5, "model__dropout": 0.1}
    changes |= {"distillation__alpha": 0.2, "distillation__alpha_end": 0.8}
    if cached:
        cache = tmp_path / "cache"
        of = ["--teachers", *teachers, "--data", data / "train", "--block_size", 32, "--k", 8, "--output", cache]
        assert script("cache_teacher.py", *of).returncode == 0
        changes |= {"distillation__cache": cache, "distillation__divergence": "topk_kl"}
    else:
        changes |= {"distillation__teachers": entries(teachers)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(*flags(data, whole, **changes))
    train_killed(13, *flags(data, killed, **changes))
    assert len(metrics(killed)) < 20, "the run was not interrupted"
    train(*flags(data, killed, **changes, resume="auto"))
    same_checkpoints(whole / "iter-00000020-ckpt.pth", killed / "iter-00000020-ckpt.pth")
    for name in ("train_loss", "divergence", "total_loss", "alpha", "grad_norm", "val_loss"):
        assert torch.equal(column(whole, name), column(killed, name)), name
    assert read_record(killed).equals(read_record(whole))


def test_a_cache_of_the_whole_vocabulary_equals_the_teacher(
    data: Path, teachers: list[Path], student: Path, tmp_path: Path
) -> None:
    common = ["--teachers", *teachers, "--weights", 2, 1, "--data", data / "train", "--block_size", 32]
    whole = [*common, "--k", 96, "--dtype", "float32", "--rows_per_file", 50]
    for part in (0, 1):  # two calls share the work, and a third has nothing to do
        done = script("cache_teacher.py", *whole, "--output", tmp_path / "cache", "--parts", 2, "--part", part)
        assert done.returncode == 0, done.stdout
    again = script("cache_teacher.py", *whole, "--output", tmp_path / "cache")
    assert "0 files written" in again.stdout and f"{96 * 6} bytes per token" in again.stdout
    cached = {"distillation__cache": tmp_path / "cache"}
    train(*flags(data, tmp_path / "run", **CHANGES, **cached, train__micro_batch_samples=4))
    for name in ("train_loss", "divergence", "grad_norm"):
        torch.testing.assert_close(column(tmp_path / "run", name), column(student, name), rtol=1e-4, atol=0)

    other = [*common, "--k", 8, "--output", tmp_path / "cache"]
    refused = script("cache_teacher.py", *other)
    assert refused.returncode == 2 and "holds a different cache: k: 96 there, 8 here" in refused.stderr
    ids = tmp_path / "cache" / "ids-00001.npy"
    wrong: list[tuple[dict[str, object], str]] = [
        ({"distillation__ensemble": "probabilities"}, "ensemble 'logits' there, 'probabilities' here"),
        ({"distillation__top_k": 96}, "top_k 96 is for"),
        ({"distillation__compile_teachers": "true"}, "compile_teachers is for live teachers"),
        ({}, f"{ids} is damaged"),
        ({}, "is not finished: 1 of"),
    ]
    for changes, message in wrong:
        if message == wrong[-2][1]:
            os.truncate(ids, 1000)
        elif message == wrong[-1][1]:
            ids.unlink()
        refused = train(*flags(data, tmp_path / "other", **CHANGES, **cached, **changes), check=False)
        assert refused.returncode == 2 and message in refused.stdout, refused.stdout
        assert not (tmp_path / "other").exists(), "refused, but files were created"


def test_parts_may_start_simultaneously(tmp_path: Path) -> None:
    facts = CacheFacts("d", "concat", 8, True, 3, 96, [], "logits", 2.0, "fp32", 4, "float16", 2)
    barrier = threading.Barrier(8)

    def begin(_: int) -> None:
        barrier.wait()
        begin_cache(tmp_path / "cache", facts)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(begin, range(8)))
    assert read_facts(tmp_path / "cache") == facts


def test_a_cache_of_many_files_keeps_few_open(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.distillation.teacher_cache.MAX_MAPS", live_maps() + 2)
    before = len(os.listdir("/proc/self/fd"))
    facts = CacheFacts("d", "concat", 8, True, 9, 96, [], "logits", 2.0, "fp32", 4, "float16", 2)
    begin_cache(tmp_path, facts)
    for file in range(facts.n_files):
        for name in ("ids", "log_probs"):
            value = file if name == "ids" else -file
            np.save(facts.path(tmp_path, name, file), np.full(facts.shape(file), value, facts.dtype_of(name)))
    cached, rows = CachedTeacher(tmp_path, torch.device("cpu")), ConcatRows(PackedDataset(data / "train"), 8)
    for row in (0, 8, 3, 5, 1, 8):
        batch = read_rows(rows, np.array([row]), np.array([0]), document_mask=True)
        assert (cached.read(batch)[0] == row // 2).all()
        assert len(cached._maps) <= 2
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_a_cache_over_a_packing_plan_is_read_by_two_ranks(
    data: Path, teachers: list[Path], tmp_path: Path, packing: str
) -> None:
    """BabyLlama's weighting with an incomplete last step: live and cached teachers, one rank and two."""
    of: dict[str, object] = {"data__packing": packing, "train__max_epochs": 0.5, "distillation__reduction": "babyllama"}
    of |= {"objective": "distillation", "train__max_steps": None, "save__every_steps": 100, "data__plan_dir": tmp_path}
    of |= {"train__global_batch_samples": 48, "train__micro_batch_samples": 12}
    cache = tmp_path / "cache"
    line: list[object] = ["--teachers", *teachers, "--weights", 2, 1, "--data", data / "train", "--packing", packing]
    line += ["--block_size", 32, "--k", 96, "--dtype", "float32", "--output", cache, "--plan_dir", tmp_path]
    assert script("cache_teacher.py", *line).returncode == 0
    train(*flags(data, tmp_path / "live", **of, distillation__teachers=entries(teachers)))
    train(*flags(data, tmp_path / "two", **of, distillation__cache=cache, devices=2, strategy="ddp"))
    for name in ("train_loss", "divergence", "total_loss", "grad_norm"):
        torch.testing.assert_close(column(tmp_path / "two", name), column(tmp_path / "live", name), rtol=1e-4, atol=0)
    last = metrics(tmp_path / "live")[-1]
    step = int(last["step"]) - 1
    record = [r for r in read_record(tmp_path / "live").to_pylist() if r["step"] == step]
    rows, targets = len({r["sample"] for r in record}), sum(r["targets"] for r in record)
    assert 0 < rows < 48
    want = 0.5 * float(last["train_loss"]) + 0.5 * 4 * float(last["divergence"]) * targets / rows
    assert float(last["total_loss"]) == pytest.approx(want, rel=1e-6)


def test_a_killed_cache_is_completed_by_the_same_call(data: Path, teachers: list[Path], tmp_path: Path) -> None:
    def call(folder: str) -> list[object]:
        of: list[object] = ["--teachers", *teachers, "--data", data / "train", "--block_size", 32, "--k", 8]
        of += ["--batch", 1, "--rows_per_file", 100]
        return [*of, "--output", tmp_path / folder]

    assert script("cache_teacher.py", *call("whole")).returncode == 0
    second = tmp_path / "killed" / ".log_probs-00001.npy.tmp"
    kill_once(lambda: second.exists() and second.stat().st_size > 0, "scripts/cache_teacher.py", *call("killed"))
    assert second.exists() and not (tmp_path / "killed" / "log_probs-00001.npy").exists()
    with open(
        second.with_name(".00001.lock"), "a"
    ) as elsewhere:  # a file that another call is working on is left to it
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        done = script("cache_teacher.py", *call("killed"))
        assert done.returncode == 0 and "another call is writing 1" in done.stdout
    assert "1 files written" in script("cache_teacher.py", *call("killed")).stdout
    whole, killed = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "killed"))
    assert whole == killed, "other files than those of an uninterrupted cache"


def test_a_cache_on_a_full_disk_leaves_no_partial_file(data: Path, teachers: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    of = ["--teachers", teachers[0], "--data", data / "train", "--block_size", 32, "--k", 8, "--output", cache]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        done = script("cache_teacher.py", *of)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 2 and "File too large" in done.stderr
    assert [p.name for p in cache.iterdir()] == ["cache.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--teachers": "nowhere"}, "nowhere"),
        ({"--data": "nowhere"}, "nowhere"),
        ({"--block_size": 4096}, "context"),
        ({"--block_size": 0}, "--block_size 0"),
        ({"--k": 97}, "--k 97 exceeds"),
        ({"--k": 0}, "--k 0"),
        ({"--temperature": -1}, "--temperature -1.0 must be"),
        ({"--temperature": "nan"}, "--temperature nan must be"),
        ({"--weights": 0}, "--weights 0.0 must be"),
        ({"--weights": [1, 1]}, "--weights has 2 numbers"),
        ({"--output": "."}, "holds other files"),
        ({"--output": "full/cache"}, "full"),
        ({"--part": 1}, "--part 1"),
        ({"--data": "other"}, "was trained with another tokenizer: its fingerprint is"),
    ],
)
def test_caching_errors_are_named(
    data: Path,
    teachers: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").write_text("a file")
    shutil.copytree(data / "train", tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "another"
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    given = {"--teachers": teachers[0], "--data": data / "train", "--block_size": 32, "--k": 8, "--output": "cache"}
    line: list[object] = []
    for name, value in {**given, **arguments}.items():
        line += [name, *(value if isinstance(value, list) else [value])]
    assert message in script_error("cache_teacher.py", *line)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "other"], "leftovers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "cross_entropy"}, "--objective cross_entropy: --distillation.teachers"),
        ({"distillation__teachers": None}, "need each other"),
        ({"distillation__divergence": "topk_kl"}, "topk_kl needs --distillation.top_k"),
        ({"distillation__top_k": 8}, "top_k 8 is for --distillation.divergence topk_kl"),
        ({"distillation__teacher_device": "gpu"}, "teacher_device gpu is not cpu, cuda or cuda:N"),
        ({"distillation__teacher_device": "cuda:99"}, "teacher_device cuda:99: this machine has"),
        ({"distillation__alpha": 1.5}, "alpha 1.5 is not in"),
        ({"model__vocab_size": 120}, "has a vocabulary of 96 ids, the student"),
        ({"train__block_size": 64}, "has a context of 32 tokens, less than a row's 64"),
        ({"distillation__shard_teachers": "true"}, "shard_teachers true needs --strategy fsdp"),
        ({"distillation__cache": "nowhere"}, "not both"),
        ({"init_from": "x", "init_layers": "[0]", "init_optimizer": "true"}, "init_layers exclude each other"),
    ],
)
def test_mistakes_are_named(
    data: Path, teachers: list[Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    given = {**CHANGES, "distillation__teachers": entries(teachers), **changes}
    done = train(*flags(data, tmp_path / "run", **given), check=False)
    assert done.returncode == 2
    assert re.search(message, done.stdout), done.stdout


def test_alpha_is_a_pure_function_of_the_step() -> None:
    args = DistillationArgs(alpha=0.2, alpha_end=1.0)
    assert [alpha_at(args, step, 5) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    args = DistillationArgs(alpha=0.0, alpha_end=1.0, alpha_schedule="cosine")
    assert [alpha_at(args, step, 3) for step in range(3)] == pytest.approx([0.0, 0.5, 1.0])
    assert alpha_at(DistillationArgs(alpha=0.3), 7, 9) == 0.3


def test_selected_layers_may_omit_kinds_of_layers() -> None:
    gemma, llama4 = get_config("babylm-gemma2"), get_config("babylm-llama4", moe_layers=(False, True))
    assert with_layers(gemma, [1, 3]).attention_pattern == ("full",)
    assert with_layers(gemma, [0, 1, 2]).sliding_window_size == gemma.sliding_window_size
    dense = with_layers(llama4, [0, 2])
    assert dense.n_expert == 0 and dense.attention_chunk_size == llama4.attention_chunk_size
    assert with_layers(llama4, [3]).rope_layers == (False,) and with_layers(llama4, [3]).n_expert == 16
    with pytest.raises(ValueError, match="has the layers 0 to 11"):
        with_layers(gemma, [12])


def test_a_student_starts_from_selected_layers(data: Path, teachers: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    none = {"model__n_layer": None, "model__n_head": None, "model__n_query_groups": None, "model__n_embd": None}
    changes = {**none, "model__intermediate_size": None, "optim__lr": 1e-12, "optim__lr_min": 0}
    changes["optim__warmup_steps"] = 0
    train(*flags(data, run, train__max_steps=1, init_from=teachers[0], init_layers="[1]", **changes))
    done = train(
        *flags(data, run, train__max_steps=2, init_from=teachers[0], init_layers="[1]", resume="auto", **changes),
        "--resume_allow=train.max_steps",
        "--preflight",
        check=False,
    )
    assert "one step" in done.stdout and "--init_layers" not in done.stdout, done.stdout
    config, tensors = load_tensors(run)
    _, theirs = load_tensors(teachers[0])
    assert config.n_layer == 1
    for name in tensors:
        torch.testing.assert_close(tensors[name], theirs[name.replace(".h.0.", ".h.1.")], rtol=0, atol=1e-9)
