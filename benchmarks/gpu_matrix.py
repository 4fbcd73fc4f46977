"""Small real runs of everything that depends on the device, one line each; exits with 1 if any of them failed.

    python benchmarks/gpu_matrix.py --output DIR [--device cpu] [--jobs 4] [--only REGEX]

Every command of an entry (training, resume, conversion, ...) is a process forked from this one, which has imported
everything and never touches the device. With `--device cpu`, entries that need CUDA are skipped with the reason. The
output of an entry is in DIR/NAME.log.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
import transformers  # noqa: F401 - imported once, for verify_hf

from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint
from pretrain.cli.run_parser import build_parser
from pretrain.fabric_train import leave
from pretrain.fabric_train import main as train_main

STEPS, BLOCK_SIZE = 4, 64
COMPILED = "compiled: {n} of {n} blocks of the model"


@dataclass
class Place:
    """Where an entry runs."""

    device: str
    folder: Path
    data: Path
    """The run folder of the first run: the others use its data, and its model is the teacher."""
    log: Path


Check = Callable[[Place], None]


# --- building blocks of entries --------------------------------------------------------------------------------------


def forked(work: Callable[[], int | None], log: Path) -> None:
    """Run in a forked process, output to the end of the log. Raises RuntimeError unless it ends with 0."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for target in (1, 2):
                os.dup2(output, target)
            # The caller may have replaced them; what a command prints is in the log either way.
            sys.stdout, sys.stderr = (os.fdopen(target, "w", buffering=1, closefd=False) for target in (1, 2))
            status = work() or 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"status {status}: {lines[-1] if lines else 'no output'}")


def train(place: Place, run: str, **changes: object) -> None:
    """A training run of a few steps. Changes are settings with dots as double underscores."""
    settings: dict[str, object] = {
        "out_dir": place.folder / run,
        "data.train": place.data / "data" / "packed" / "train",
        "data.val": place.data / "data" / "packed" / "val",
        "accelerator": place.device,
        "devices": 1,
        "model.name": "debug",
        "model.n_layer": 2,
        "train.max_steps": STEPS,
        "train.global_batch_samples": 4,
        "train.micro_batch_samples": 2,
        "train.block_size": BLOCK_SIZE,
        "optim.warmup_steps": 1,
        "save.every_steps": STEPS // 2,
        "eval.every_steps": STEPS,
        "eval.max_samples": 4,
        "log.every_steps": 1,
        "precision": "bf16",
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    argv = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    with open(place.log, "a") as f:
        f.write(f"\n== fabric_train.py {' '.join(argv)}\n")
    forked(lambda: leave(train_main(argv)), place.log)
    losses_are_sound(place.folder / run)


def losses_are_sound(run: Path) -> None:
    """Raises RuntimeError unless every step has a finite loss below 1.5 times that of a uniform guess."""
    with open(run / "metrics.csv", newline="") as f:
        losses = [float(row["train_loss"]) for row in csv.DictReader(f) if row["train_loss"]]
    vocab_size = Checkpoint(list_checkpoints(run)[-1]).model_config.vocab_size
    if len(losses) < STEPS or not all(math.isfinite(x) and x < 1.5 * math.log(vocab_size) for x in losses):
        raise RuntimeError(f"the losses of {run} are {losses}")


def script(place: Place, name: str, *arguments: object) -> None:
    """Run a script by path."""

    def work() -> None:
        sys.argv = [str(ROOT / "scripts" / name), *map(str, arguments)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    with open(place.log, "a") as f:
        f.write(f"\n== {name} {' '.join(map(str, arguments))}\n")
    forked(work, place.log)


def expect(place: Place, text: str) -> None:
    if text not in place.log.read_text(errors="replace"):
        raise RuntimeError(f"its output lacks {text!r}")


def same_after_resume(place: Place, run: str, equal: bool, **changes: object) -> None:
    """Train, resume from the middle, and compare both ends: bit for bit, or nearly."""
    train(place, run, **changes)
    folder = place.folder / run
    middle, end = list_checkpoints(folder)[-2:]
    first_end = place.folder / f"{run}-first-end.pth"
    (shutil.copytree if end.is_dir() else shutil.copy)(end, first_end)
    train(place, run, **changes, resume=middle.name)

    def compare() -> None:
        one, two = Checkpoint(first_end), Checkpoint(list_checkpoints(folder)[-1])
        assert sorted(one.names()) == sorted(two.names())
        for name in one.names():
            a, b = one.tensor(name), two.tensor(name)
            if equal:
                assert torch.equal(a, b), f"{name} differs after the resume"
            else:
                torch.testing.assert_close(a, b, rtol=0.1, atol=0.05, msg=name)

    forked(compare, place.log)


def invariant(place: Place) -> None:
    """On one device, with DDP and with FSDP, which have one rank here: the same bits."""
    for run, strategy in (("none", "auto"), ("ddp", "ddp"), ("fsdp", "fsdp")):
        train(place, run, strategy=strategy, train__topology_invariant="true", model__dropout=0.1)

    def compare() -> None:
        one, *others = (Checkpoint(list_checkpoints(place.folder / run)[-1]) for run in ("none", "ddp", "fsdp"))
        for other in others:
            for name in one.names():
                assert torch.equal(one.tensor(name), other.tensor(name)), f"{name} depends on the strategy"

    forked(compare, place.log)


# --- the entries -----------------------------------------------------------------------------------------------------


def plain(equal_resume: bool = False, **changes: object) -> Check:
    def check(place: Place) -> None:
        if equal_resume:
            same_after_resume(place, "run", True, **changes)
        else:
            train(place, "run", **changes)

    return check


def compiled(changes: dict[str, object], n_layer: int = 2) -> Check:
    def check(place: Place) -> None:
        train(place, "run", compile="true", model__n_layer=n_layer, **changes)
        expect(place, COMPILED.format(n=n_layer))

    return check


def in_float8(changes: dict[str, object]) -> Check:
    """Compiled, as CUDA requires; on a CPU not, for the time that takes. Resumed and exported."""

    def check(place: Place) -> None:
        cuda = place.device == "cuda"
        settings = {"precision": "fp8", "compile": "true" if cuda else "false", **changes}
        same_after_resume(place, "run", not cuda or "train__deterministic" in changes, **settings)
        expect(place, "float8   ")
        script(place, "convert_to_hf.py", "--checkpoint", place.folder / "run", "--output", place.folder / "hf")

    return check


def sharded_asynchronous(place: Place) -> None:
    changes: dict[str, object] = {"strategy": "fsdp", "save__state_dict_type": "sharded", "save__asynchronous": "true"}
    same_after_resume(place, "run", place.device == "cpu", **changes, save__every_steps=1)


def taught(place: Place) -> None:
    """A student of the base run, live."""
    teachers = f'[{{"path": "{place.data}"}}]'
    train(place, "run", objective="distillation", distillation__teachers=teachers)


def taught_by_a_cache(place: Place) -> None:
    cache = place.folder / "cache"
    options = ("--block_size", BLOCK_SIZE, "--k", 8, "--output", cache)
    script(
        place,
        "cache_teacher.py",
        "--teachers",
        place.data,
        "--data",
        place.data / "data" / "packed" / "train",
        *options,
    )
    train(
        place,
        "run",
        objective="distillation",
        distillation__cache=cache,
        distillation__divergence="topk_kl",
    )


def taught_compiled(place: Place) -> None:
    teachers = f'[{{"path": "{place.data}"}}]'
    changes: dict[str, object] = {"objective": "distillation", "distillation__teachers": teachers}
    train(place, "run", **changes, distillation__compile_teachers="true", compile="true")
    expect(place, f"{COMPILED.format(n=2)}, 2 of 2 blocks of the teachers")


def converted(place: Place) -> None:
    """To Hugging Face, checked by transformers, and a sample of it on the device; the record of the run is verified."""
    train(place, "run", precision="fp32")
    run, folder = place.folder / "run", place.folder / "hf"
    script(place, "convert_to_hf.py", "--checkpoint", run, "--output", folder)
    script(place, "verify_hf.py", "--run", run, "--hf", folder)
    device = ("--device", place.device, "--max_new_tokens", 8)
    script(place, "generate.py", "--model", folder, "--prompt_ids", "5,6,7", *device)
    script(place, "trace_data.py", "verify", run)


def evaluated(place: Place) -> None:
    """The loss on the validation data by the device is that by a CPU."""
    checkpoint, losses = list_checkpoints(place.data)[-1], []
    for device in (place.device, "cpu"):
        output = place.folder / f"on-{device}.json"
        script(place, "evaluate.py", checkpoint, "--device", device, "--output", output, "--overwrite")
        losses.append(json.loads(output.read_text())["tasks"]["perplexity"]["metrics"]["loss"])
    if abs(losses[0] - losses[1]) > 1e-4:
        raise RuntimeError(f"the loss is {losses[0]} on {place.device} and {losses[1]} on a CPU")


def examined(place: Place) -> None:
    """What looks at a machine and at a run before it starts."""
    script(place, "doctor.py")
    train_set = place.data / "data" / "packed" / "train"
    flags = {"data.train": train_set, "out_dir": place.folder / "run", "accelerator": place.device, "devices": 1}
    flags |= {"model.name": "debug", "train.max_steps": STEPS, "precision": "bf16"}
    argv = [*(f"--{key}={value}" for key, value in flags.items()), "--preflight"]
    forked(lambda: leave(train_main(argv)), place.log)
    gpu = "h100" if place.device == "cuda" else "cpu"
    script(place, "plan_run.py", "--gpu", gpu, "--config", ROOT / "configs" / "llammlein_120M.yaml")


GPT_2: dict[str, object] = {
    "model__norm_class_name": "LayerNorm",
    "model__position_embedding": "learned",
    "model__mlp_gated": "false",
    "model__activation": "gelu_tanh",
    "model__attention_bias": "true",
    "model__mlp_bias": "true",
    "model__tie_embeddings": "true",
}
GPT_J: dict[str, object] = {
    "model__norm_class_name": "LayerNorm",
    "model__rotary_size": 8,
    "model__parallel_residual": "true",
    "model__shared_attention_norm": "true",
    "model__mlp_gated": "false",
    "model__activation": "gelu_tanh",
    "model__mlp_bias": "true",
    "model__lm_head_bias": "true",
}
SLIDING: dict[str, object] = {"model__attention_pattern": "[sliding,full]", "model__sliding_window_size": 16}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"model__attention_pattern": "[sliding]", "model__sliding_window_size": 16},
    "gpt2": GPT_2,
    "gptj": GPT_J,
    "gpt_neox": {**GPT_J, "model__shared_attention_norm": "false", "model__attention_bias": "true"},
    "olmo2": {"model__pre_norm": "false", "model__post_norm": "true", "model__qk_norm": "projection"},
    "qwen3": {"model__qk_norm": "head"},
    "gemma2": {
        **SLIDING,
        "model__attention_logit_softcapping": 50,
        "model__final_logit_softcapping": 30,
        "model__post_norm": "true",
        "model__norm_offset": 1.0,
        "model__activation": "gelu_tanh",
        "model__scale_embeddings": "true",
    },
    "llama4": {
        "model__attention_pattern": "[chunked,full]",
        "model__attention_chunk_size": 16,
        "model__n_expert": 4,
        "model__n_expert_per_token": 1,
        "model__moe_layers": "[false,true]",
    },
}


def profiled(place: Place) -> None:
    train(place, "run", profile__steps=1, profile__start=1)
    expect(place, f"Steps 3 to 3 on {place.device}, ")
    files = sorted(path.name for path in (place.folder / "run" / "profile").iterdir())
    if len(files) != (4 if place.device == "cuda" else 3):
        raise RuntimeError(f"the profile has the files {files}")


def replayed(place: Place) -> None:
    """Re-executes the last steps of a deterministic run, bit for bit, and those of another beside its noise floor."""
    for run, deterministic in (("run", "true"), ("other", "false")):
        train(place, run, train__deterministic=deterministic)
        script(place, "replay.py", *list_checkpoints(place.folder / run)[-2:])
        if deterministic == "true":
            expect(place, "state: parameters and optimizer state are equal")


def fitted(place: Place) -> None:
    automatic = {"train__micro_batch_samples": "auto", "train__activation_checkpointing": "auto"}
    train(place, "run", **automatic)
    expect(place, "memory   micro-batch of 4 rows: ")
    if place.device == "cuda":  # a compiled step of a single row takes 0.2 GiB, of the whole batch more than the limit
        batch = {"train__global_batch_samples": 256, "model__n_embd": 256, "train__memory_limit_gib": 0.4}
        train(place, "small", **automatic, **batch, compile="true")
        expect(place, "GiB measured")
    else:
        train(place, "small", **automatic, train__memory_limit_gib=0.02)
        expect(place, "GiB estimated")


ENTRIES: dict[str, Check] = {
    "bf16": plain(),
    "fp16": plain(precision="fp16"),
    "fp32": plain(precision="fp32"),
    "deterministic-resume": plain(equal_resume=True, train__deterministic="true"),
    "replay": replayed,
    "topology-invariant": invariant,
    "muon-deterministic-resume": plain(equal_resume=True, train__deterministic="true", optim__name="muon"),
    "muon-fsdp-fp16": plain(strategy="fsdp", precision="fp16", optim__name="muon"),
    "no-documents": plain(data__document_mask="false"),
    "dropout": plain(model__dropout=0.1),
    "fsdp-sharded-async-resume": sharded_asynchronous,
    "fsdp-shard-grad-op": plain(strategy="fsdp", sharding_strategy="SHARD_GRAD_OP"),
    "ddp": plain(strategy="ddp"),
    "cpu-offload": plain(strategy="fsdp", train__cpu_offload="true"),
    "recompute-full": plain(train__activation_checkpointing="full"),
    "recompute-block": plain(train__activation_checkpointing="block"),
    "recompute-op": plain(train__activation_checkpointing="op"),
    "profile": profiled,
    "automatic-memory": fitted,
    "distillation": taught,
    "distillation-cached": taught_by_a_cache,
    "convert-generate-record": converted,
    "evaluate": evaluated,
    "doctor-preflight-plan": examined,
    **{f"compile-{name}": compiled(changes) for name, changes in FAMILIES.items()},
    **{
        f"compile-gemma2-recompute-{kind}": compiled(
            {**FAMILIES["gemma2"], "train__activation_checkpointing": kind}, n_layer=4
        )
        for kind in ("block", "op")
    },
    "compile-fsdp": compiled({"strategy": "fsdp"}),
    "loss-fused": plain(train__loss_kernel="fused"),
    "loss-plain": plain(train__loss_kernel="plain"),
    "fa4": plain(train__attention="fa4"),
    "fa4-deterministic-resume": plain(equal_resume=True, train__attention="fa4", train__deterministic="true"),
    "fp8-resume": in_float8({}),
    "wsd": plain(optim__schedule="wsd", optim__decay_steps=2),
    # Every fast part at once, and still bit-equal after a resume.
    "all-deterministic-resume": in_float8(
        {"train__deterministic": "true", "optim__name": "muon", "optim__schedule": "wsd", "optim__decay_steps": 2}
    ),
    "fp8-fsdp-keep-ends": in_float8({"strategy": "fsdp", "train__fp8_keep_ends": "true", "model__n_layer": 3}),
    "compile-distillation": taught_compiled,
}
NEEDS_CUDA = dict.fromkeys(("fp16", "muon-fsdp-fp16"), "fp16 is not supported on a CPU")
NEEDS_CUDA["loss-fused"] = "the fused loss is a Triton kernel for CUDA"


def capability_of(device: str) -> tuple[int, ...]:
    """The GPU's compute capability, read in another process: this one must not touch the device. () on a CPU."""
    if device == "cpu":
        return ()
    code = "import torch; print(*torch.cuda.get_device_capability())"
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    return tuple(int(part) for part in output.split())


def reason_to_skip(name: str, device: str, capability: tuple[int, ...]) -> str | None:
    """Why an entry does not run here. `capability`: see `capability_of`."""
    if name.startswith("fa4") and capability and capability[0] not in (9, 10):
        return "FlashAttention 4 needs a Hopper or Blackwell GPU"
    if ("fp8" in name or name.startswith("all-")) and capability and capability < (8, 9):
        return "float8 needs an Ada, Hopper or Blackwell GPU"
    if name.startswith("fa4") and (device == "cpu" or importlib.util.find_spec("cutlass") is None):
        return 'needs FlashAttention 4 (the extra "hopper") and a GPU'
    return NEEDS_CUDA.get(name) if device == "cpu" else None


def run_entry(name: str, place: Place) -> str | None:
    """None, or the reason for its failure."""
    place.folder.mkdir(parents=True)
    try:
        ENTRIES[name](place)
    except Exception as error:
        return f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder for runs and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, default=4, help="entries at the same time (default %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="entries whose name matches")
    args = parser.parse_args()
    names = [name for name in ENTRIES if re.search(args.only, name)]
    if not names:
        parser.error(f"--only {args.only} matches none of {', '.join(ENTRIES)}")
    if args.output.exists():
        parser.error(f"--output {args.output} exists: give a new folder")
    output: Path = args.output.absolute()
    output.mkdir(parents=True)
    build_parser()  # half the time of a short run; done once instead of per fork

    base = output / "base"
    flags = {"data__train": None, "data__val": None, "data__synthetic__tokens": 20000, "precision": "fp32"}
    train(Place(args.device, output, base, output / "base.log"), "base", **flags)

    waiting, running, failed, began = list(names), dict[int, tuple[str, float]](), 0, time.monotonic()
    capability = capability_of(args.device)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            reason = reason_to_skip(name, args.device, capability)
            if reason is not None:
                print(f"SKIP  {name:32s}         {reason}", flush=True)
                continue
            pid = os.fork()
            if pid == 0:
                fault = run_entry(name, Place(args.device, output / name, base, output / f"{name}.log"))
                (output / f"{name}.fault").write_text(fault or "")
                os._exit(0)
            running[pid] = (name, time.monotonic())
        if not running:
            continue
        pid, _ = os.wait()
        name, since = running.pop(pid)
        report = output / f"{name}.fault"
        fault = report.read_text() if report.exists() else "its process died"
        failed += bool(fault)
        seconds = time.monotonic() - since
        print(f"{'FAIL' if fault else 'PASS'}  {name:32s} {seconds:6.1f} s{'  ' if fault else ''}{fault}", flush=True)
    print(f"{len(names)} entries, {failed} failed, {time.monotonic() - began:.0f} s; logs in {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
