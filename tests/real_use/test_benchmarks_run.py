"""Every script of benchmarks/ runs at toy size and writes positive figures of all contenders; durations are not
tested.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from running import ROOT, script, warm_python

FORKED = {"train_step"}  # the processes they start may be forked from one that has imported everything
# Started or imported by the others.
PARTS = {"corpus_runs", "peer_convert", "peer_loader", "peer_megatron", "peer_prepare", "peer_step", "provenance"}


def benchmark(name: str, *arguments: object) -> tuple[int, str]:
    """Run a benchmark by path in this process; returns its status and output."""
    path, out = str(ROOT / "benchmarks" / f"{name}.py"), io.StringIO()
    with (
        patch.object(sys, "argv", [path, *map(str, arguments)]),
        patch.object(sys, "path", list(sys.path)),
        patch.object(sys, "executable", warm_python() if name in FORKED else sys.executable),
        contextlib.redirect_stdout(out),
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            assert left.code is None or isinstance(left.code, int), left.code
            return left.code or 0, out.getvalue()
    return 0, out.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/text/train.jsonl, and DIR/tok trained on it."""
    folder = tmp_path_factory.mktemp("corpus")
    assert script("make_synthetic.py", "--output", folder / "text", "--tokens", 20000, "--seed", 1).returncode == 0
    text, tok = folder / "text" / "train.jsonl", folder / "tok"
    assert script("train_tokenizer.py", "--input", text, "--output", tok, "--vocab_size", 300).returncode == 0
    return folder


def positive(*figures: float) -> bool:
    return bool(figures) and all(figure > 0 for figure in figures)


# --- arguments and checks, by name -----------------------------------------------------------------------------------


def boundaries_check(found: dict[str, Any]) -> None:
    for row in found["results"]:
        assert row["1 steps"]["sizes"] <= row["4 steps"]["sizes"] <= row["exact"]["sizes"] and not row["exact"]["empty"]
        assert 0 <= row["4 steps"]["empty"] <= row["1 steps"]["empty"] + 0.01


def cache_check(found: dict[str, Any]) -> None:
    assert positive(found["peak_folder_mb"], found["staged_mb_s"]) and not found["failures"]


def checkpoint_check(found: dict[str, Any]) -> None:
    saves = {"full, sync", "full, async", "sharded, sync", "sharded, async"}
    assert saves | {"none"} <= set(found["rows"])
    assert positive(*(found["rows"][name]["median"]["total_s"] for name in saves))


def convert_check(found: dict[str, Any]) -> None:
    assert positive(found["summary"]["warm"]["ours / copy"]) and found["skipped"] == "no --peer litgpt=PYTHON"


def dedup_check(found: dict[str, Any]) -> None:
    assert {"bloom", "exact", "near", "text"} <= set(found)
    rates = (v for k, v in found["text"].items() if k.endswith("_mb_per_s"))
    assert positive(
        found["bloom"]["million_paragraphs_per_s"], found["exact"]["join_s"], found["near"]["join_s"], *rates
    )
    assert found["bloom"]["missed"] == 0


def distill_check(found: dict[str, Any]) -> None:
    assert set(found["rows"]) == {"ours", "naive"}
    assert positive(*(row["median"]["memory_bytes"] for row in found["rows"].values()))


def families_check(found: dict[str, Any]) -> None:
    assert set(found["families"]) == {"Llama", "GPT-J", "GPT-2"}
    for facts in found["families"].values():
        assert positive(facts["parameters"], *facts["runs"][0]["val_loss"])


def generation_check(found: dict[str, Any]) -> None:
    rows = found["results"].values()
    assert len(rows) >= 2 and positive(*(row[side] for row in rows for side in ("ours", "transformers", "ratio")))


def loss_curves_check(found: dict[str, Any]) -> None:
    assert set(found["summary"]) == {"float32", "bf16", "fp8"}
    assert all(positive(row["train_loss"], row["val_loss"]) for row in found["summary"].values())
    assert positive(*(found["summary"][name]["distance"] for name in ("bf16", "fp8")))


def loader_check(found: dict[str, Any]) -> None:
    ours = [name for name in found["rows"] if name.startswith("llammlein")]
    measured = [name for name, row in found["rows"].items() if "microseconds" in row]
    assert set(ours) | {"gather", "gather-targets", "tinyllama"} <= set(measured)
    assert positive(*(us for name in measured for us in found["rows"][name]["microseconds"]))


def loss_check(found: dict[str, Any]) -> None:
    assert {"plain", "full logits"} <= set(found["rows"]) and set(found["skipped"]) >= {"liger"}
    for row in found["rows"].values():
        assert positive(row["ms"], row["speed_to_plain"]) and row["error_head"] < 0.02


def test_steps_to_a_loss() -> None:
    steps_to = runpy.run_path(str(ROOT / "benchmarks" / "corpus_runs.py"))["steps_to"]
    curve = {10: 3.0, 20: 2.0, 30: 1.0}
    assert [steps_to(loss, curve) for loss in (4.0, 3.0, 2.5, 1.0, 0.9)] == [10, 10, 15, 30, None]


def optimizers_check(found: dict[str, Any]) -> None:
    assert set(found["summary"]) == {"adamw", "muon"}
    assert all(positive(row["val_loss"], row["step_cpu_s"]) for row in found["summary"].values())
    assert found["summary"]["adamw"]["steps_to_adamw"] is not None


def packed(corpus: Path, folder: Path) -> Path:
    """The corpus as packed train and val."""
    text = ("--input", corpus / "text" / "train.jsonl", "--tokenizer", corpus / "tok", "--val_fraction", 0.1)
    assert script("prepare_data.py", *text, "--output", folder / "data").returncode == 0
    return folder / "data"


def plan_loss_check(found: dict[str, Any]) -> None:
    assert set(found["from"]) == {"3", "4", "6", "8"}
    for row in found["from"].values():
        assert len(row["runs"]) == 20 and positive(row["median_width"], row["median_error"]) and row["covered"] <= 20
        assert all(run["low"] < run["median"] < run["high"] for run in row["runs"].values())


def plan_memory_check(found: dict[str, Any]) -> None:
    (row,) = found["trials"].values()
    assert positive(row["planned_mib"], row["measured_mib"], row["default_allocator_ratio"], row["speed_ratio"])
    assert row["memory_ratio"] == row["measured_mib"] / row["planned_mib"]


def prepare_check(found: dict[str, Any]) -> None:
    rows = found["rows"]
    assert positive(*rows["llammlein json"]["mb_per_s"], *rows["encode_batch_fast"]["mb_per_s"])
    assert all("skipped" in row or positive(*row["mb_per_s"]) for row in rows.values())


def real_model_check(found: dict[str, Any]) -> None:
    assert found["bits_per_byte"]["relative_difference"] <= 1e-4


def record_check(found: dict[str, Any]) -> None:
    assert found["made"]["rows"] >= 20000
    assert found["answers"] and positive(*(a["lines"] for a in found["answers"]))


def startup_check(found: dict[str, Any]) -> None:
    (row,) = found["results"]
    assert positive(row["ours"]["cpu_s"], row["ours"]["wall_s"], row["ours"]["modules"]) and not row["ours"]["heavy"]


def students_check(found: dict[str, Any]) -> None:
    assert positive(*(value for run in found["bits_per_byte"] for facts in run.values() for value in facts.values()))


def topology_invariant_check(found: dict[str, Any]) -> None:
    assert len(found["contenders"]) == 4
    for row in found["contenders"].values():
        assert positive(row["tokens_per_s"], row["ratio"], row["memory_gib"])


def train_step_check(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if "failed" not in row]
    names = {"llammlein", "llammlein-documents", "ours --train.attention loop"}
    assert names <= {row["name"] for row in rows} and {(row["rows"], row["tokens_a_row"]) for row in rows} == {
        (2, 64),
        (4, 32),
    }
    assert "transformers" in {row["name"] for row in found["rows"]} and positive(*found["matmul_flops_per_s"])
    assert all(positive(row["tokens_per_s"], row["loss"], row["rate_to_ours"], row["matmul_share"]) for row in rows)


Arguments = Callable[[Path, Path], list[object]]  # of the corpus and a folder for outputs
SCRIPTS: dict[str, tuple[Arguments, Callable[[dict[str, Any]], None]]] = {
    "boundaries": (
        lambda corpus, made: ["--mean", 100, "--rows", 2, 8, "--block_size", 512, "--micro_batches", 200],
        boundaries_check,
    ),
    "cache": (
        lambda corpus, made: [
            *("--dataset_mb", 4, "--source_mb_s", 400, "--use_mb_s", 20, "--budget_mb", 2, "--chunk_mb", 0.0625),
            *("--row_tokens", 256, "--block_rows", 256, "--group_blocks", 4, "--epochs", 1, "--cache_dir", made),
        ],
        cache_check,
    ),
    "checkpoint": (lambda corpus, made: ["--model", "debug", "--steps", 4, "--rounds", 1], checkpoint_check),
    "convert": (
        lambda corpus, made: ["--model", "debug", "--ranks", 2, "--rounds", 1, "--cold_rounds", 0, "--folder", made],
        convert_check,
    ),
    "dedup": (
        lambda corpus, made: [
            *("--paragraphs", 20000, "--signatures", 500, "--corpus", corpus / "text" / "train.jsonl"),
            *("--documents", 50),
        ],
        dedup_check,
    ),
    "distill": (lambda corpus, made: ["--rounds", 1, "--passes", 1, "--threads", 1], distill_check),
    "families": (
        lambda corpus, made: ["--input", corpus / "text" / "train.jsonl", "--steps", 2, "--val_fraction", 0.02],
        families_check,
    ),
    "generation": (
        lambda corpus, made: ["--model", "llama-10M", "--new_tokens", 2, "--repeats", 1, "--threads", 1],
        generation_check,
    ),
    "loader": (
        lambda corpus, made: [
            *("--corpus", corpus / "text" / "train.jsonl", "--tokenizer", corpus / "tok"),
            *("--rounds", 1, "--seconds", 0.01),
        ],
        loader_check,
    ),
    "loss": (
        lambda corpus, made: ["--tokens", 64, "--n_embd", 32, "--vocab_size", 96, "--rounds", 1],
        loss_check,
    ),
    "optimizers": (
        lambda corpus, made: [
            *("--input", corpus / "text" / "train.jsonl", "--steps", 4, "--seeds", 1, "--lr", 0.01),
            *("--val_fraction", 0.1),
        ],
        optimizers_check,
    ),
    "loss_curves": (lambda corpus, made: ["--steps", 4, "--arms", "fp8"], loss_curves_check),
    "plan_loss": (lambda corpus, made: ["--data", packed(corpus, made), "--scale", 0.005], plan_loss_check),
    "plan_memory": (lambda corpus, made: ["--only", "2M 8x256"], plan_memory_check),
    "prepare": (
        lambda corpus, made: [
            *("--corpus", corpus / "text" / "train.jsonl", "--tokenizer", corpus / "tok"),
            *("--megabytes", 0.02, "--rounds", 1, "--workers", 1),
        ],
        prepare_check,
    ),
    "record": (lambda corpus, made: ["--rows", 20000, "--dir", made], record_check),
    "startup": (lambda corpus, made: ["--rounds", 1, "--only", "generate"], startup_check),
    "students": (
        lambda corpus, made: [
            *("--input", corpus / "text" / "train.jsonl", "--documents", 40, "--val_documents", 4, "--seeds", 1),
            *("--epochs", 1, "--k", 4),
        ],
        students_check,
    ),
    "topology_invariant": (
        lambda corpus, made: ["--model", "debug", "--block_size", 32, "--steps", 1, "--rounds", 1],
        topology_invariant_check,
    ),
    "train_step": (
        lambda corpus, made: [
            *("--model", "debug", "--batches", 2, "4x32", "--block_size", 64, "--document_tokens", 40),
            *("--threads", 1, "--steps", 1, "--rounds", 1, "--warmup_steps", 1, "--ours=--train.attention loop"),
        ],
        train_step_check,
    ),
}
QUICK = {"boundaries", "cache", "loss", "startup"}
OTHERS = {"gpu_matrix", "megatron_round_trip", "real_model"}  # tested below


def test_every_benchmark_is_tested_here() -> None:
    """A new benchmark without a test fails here."""
    there = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert there == PARTS | set(SCRIPTS) | OTHERS


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_benchmark_runs_at_toy_size(name: str, corpus: Path, tmp_path: Path) -> None:
    """The script exits with 0, and its JSON has figures of every contender."""
    arguments, check = SCRIPTS[name]
    (tmp_path / "made").mkdir()
    status, printed = benchmark(name, *arguments(corpus, tmp_path / "made"), "--json", tmp_path / "result.json")
    assert status == 0, printed
    check(json.loads((tmp_path / "result.json").read_text()))


def test_a_comparison_without_its_peer_is_reported() -> None:
    """Without megatron-core nothing is compared, and the exit status is not 0."""
    status, printed = benchmark("megatron_round_trip")
    assert status == 3 and "nothing was compared" in printed


def test_a_failing_trainer_is_an_error_of_the_benchmark(tmp_path: Path) -> None:
    """train_step used to exit with 0 and a table of its peers although our own side had failed."""
    with patch.object(sys, "path", list(sys.path)):
        module = runpy.run_path(str(ROOT / "benchmarks" / "train_step.py"), run_name="train_step")
    log = tmp_path / "log"
    log.write_text("Traceback\nValueError: no\n")
    assert module["last_line"](log, module["Entry"]("litgpt", None, 2, 64)) == "ValueError: no"
    with pytest.raises(SystemExit, match="(?s)ValueError: no.*llammlein ended before its last round"):
        module["last_line"](log, module["Entry"]("llammlein", "", 2, 64))


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The worker answers so, instead of a traceback; any other error still ends it."""
    with patch.object(sys, "path", list(sys.path)):
        serve = runpy.run_path(str(ROOT / "benchmarks" / "peer_step.py"), run_name="peer_step")["serve"]
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no")])

    def step() -> None:
        raise next(errors)

    monkeypatch.setattr(sys, "stdin", ["1"])
    serve("litgpt", lambda: step)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"failed": "out of memory"}
    with pytest.raises(RuntimeError, match="no"):
        serve("litgpt", lambda: step)


@pytest.mark.slow
def test_our_step_runs_at_toy_size(tmp_path: Path) -> None:
    """Our side of train_step, which used to fail immediately because its documents lacked EOS."""
    plan = ["--model", "debug", "--layers", 1, "--batches", 2, "--block_size", 64, "--document_tokens", 40]
    plan += ["--threads", 1, "--steps", 1, "--rounds", 1, "--warmup_steps", 1, "--only", "llammlein-documents"]
    status, printed = benchmark("train_step", *plan, "--json", tmp_path / "result.json")
    assert status == 0, printed
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["llammlein-documents"] and not found["skipped"]
    assert positive(found["rows"][0]["tokens_per_s"], found["rows"][0]["loss"])
    assert "llammlein-documents | 2 x 64" in (tmp_path / "result.md").read_text()


@pytest.mark.slow
def test_the_matrix_of_a_gpu_machine_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every entry that needs no compiler passes; entries that need CUDA are skipped with the reason."""
    only = ("--only", "^(?!compile)", "--jobs", 2)
    status, printed = benchmark("gpu_matrix", "--output", tmp_path / "matrix", "--device", "cpu", *only)
    assert status == 0, printed
    lines = printed.splitlines()
    skipped = [line.split()[1] for line in lines if line.startswith("SKIP")]
    assert skipped == ["fp16", "muon-fsdp-fp16", "loss-fused", "fa4", "fa4-deterministic-resume"]
    assert "fp16 is not supported on a CPU" in printed
    assert sum(line.startswith("PASS") for line in lines) >= 15
