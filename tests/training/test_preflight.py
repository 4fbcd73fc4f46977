"""The preflight: a healthy setup passes and leaves no trace; each item fails once on purpose, and is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import TIMEOUT_S
from running import ROOT, flags, shared_rank_server, write_dataset

from pretrain import fabric_train
from pretrain.fabric_train import main
from pretrain.free_memory import host_memory_bytes
from pretrain.init_from import model_config
from pretrain.preflight import machine as preflight_checks
from pretrain.preflight import trial_run as preflight_run
from pretrain.preflight.context import PreflightContext
from pretrain.preflight.machine import check_network
from pretrain.preflight.outcomes import Outcome, Ranks

ITEMS = ("devices", "environment", "network", "run folder", "trackers", "data", "disk", "memory", "one step")
FINE = {name: "ok" for name in ITEMS}


def verdicts(output: str) -> dict[str, str]:
    """item -> verdict, from the table."""
    cells = [[c.strip() for c in line.split("│")] for line in output.splitlines() if line.count("│") == 4]
    return {c[1]: c[2] for c in cells if c[1]}


def settled(output: str) -> dict[str, str]:
    """The verdicts, without warnings of items that measure this machine's current speed."""
    fast = ("environment", "disk", "one step")
    return {name: "ok" if name in fast and v == "warning" else v for name, v in verdicts(output).items()}


def advice_on(output: str, item: str) -> str:
    """The line below the table with an item's problem and advice."""
    lines = [line for line in output.splitlines() if line[9:].startswith(f"{item}: ") and "│" not in line]
    assert len(lines) == 1, output
    return lines[0]


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """path -> (mtime in ns, hash) of every file and folder."""
    return {
        str(p.relative_to(folder)): (
            p.stat().st_mtime_ns if p.is_file() else 0,
            hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "",
        )
        for p in folder.rglob("*")
    }


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few threads, small files, and no launcher variables."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(preflight_checks, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(preflight_checks, "LEAST_DISK_GBS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def look(capsys: pytest.CaptureFixture[str], data: Path, run: Path, **changes: object) -> tuple[int, str]:
    """Run a preflight in this process; returns exit status and output."""
    status = main([*flags(data, run, **changes), "--preflight"])
    return status, capsys.readouterr().out


# --- what is sound -------------------------------------------------------------------------------------------------


def test_one_process_passes_and_leaves_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = look(capsys, data, tmp_path / "runs" / "a")
    assert status == 0 and settled(output) == FINE | {"network": "skipped"}, output
    assert "one process" in advice_on(output, "network")
    assert list(tmp_path.iterdir()) == [], "the run folder or its parent remains"


SMALL_AND_SHORT = """
from pretrain.preflight import machine as preflight_checks
from pretrain.preflight import outcomes
outcomes.GRACE_S = 1.0
preflight_checks.MARKER_WAIT_S = 0.5
preflight_checks.DISK_BYTES = 1 << 20
"""
SLURM_TASK = """
import os
for name, theirs in (("SLURM_PROCID", "RANK"), ("SLURM_LOCALID", "LOCAL_RANK"), ("SLURM_NTASKS", "WORLD_SIZE")):
    os.environ[name] = os.environ.pop(theirs)
del os.environ["LOCAL_WORLD_SIZE"], os.environ["TORCHELASTIC_RUN_ID"]
"""


def test_two_slurm_tasks_pass_with_an_existing_run(data: Path, tmp_path: Path) -> None:
    """Processes started with SLURM's variables, FSDP, and an existing run, which must stay unchanged."""
    run = tmp_path / "run"
    assert main(flags(data, run, train__max_steps=4)) == 0
    before = contents(run)
    slurm = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0"}
    slurm |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
    changes: dict[str, Any] = {"devices": 2, "strategy": "fsdp", "resume": "latest", "save__state_dict_type": "sharded"}
    arguments = flags(data, run, train__max_steps=8, resume_allow="train.max_steps", **changes)
    tasks = [{"kind": "code", "text": SMALL_AND_SHORT + SLURM_TASK}]
    answer = shared_rank_server().run(2, run, [*arguments, "--preflight"], plants=tasks, env=slurm)
    assert answer.statuses == [0, 0], answer.output
    output = answer.outputs[0]
    assert settled(output) == FINE, output
    assert "iter-00000004-ckpt.pth, step 4, full" in " ".join(output.split())
    assert "Preflight" not in answer.outputs[1], "another rank than 0 prints"
    assert contents(run) == before


# --- several ranks, of which one is not sound ----------------------------------------------------------------------

SPOILED = """
import types
import torch.distributed as dist
from pretrain.preflight import machine as preflight_checks
def spoiled(tensor):
    tensor[-1] += 1
    dist.all_reduce(tensor)
preflight_checks.dist = types.SimpleNamespace(all_reduce=spoiled, get_backend=dist.get_backend)
preflight_checks.code_hash = lambda: "other"
see_marker = preflight_checks.see_marker
preflight_checks.see_marker = lambda scratch, token: see_marker(scratch / "local", token)
"""
FAILING = """
from pretrain.preflight import trial_run as preflight_run
def train_step(run, data):
    raise RuntimeError("planted")
preflight_run.train_step = train_step
"""


def look_on_two(data: Path, run: Path, code: str, **changes: object) -> tuple[list[int], str]:
    """A preflight of two ranks where rank 1 runs `code` first; returns exit statuses and rank 0's output."""
    plants = [{"kind": "code", "text": SMALL_AND_SHORT}, {"kind": "code", "rank": 1, "text": code}]
    arguments = [*flags(data, run, devices=2, **changes), "--preflight"]
    answer = shared_rank_server().run(2, run, arguments, plants=plants)
    assert not answer.exceeded, answer.output
    return answer.statuses, answer.outputs[0]


def test_a_rank_that_differs_is_named(data: Path, tmp_path: Path) -> None:
    """Rank 1 corrupts the sum, runs different code and does not see out_dir; the other items still run."""
    statuses, output = look_on_two(data, tmp_path / "run", SPOILED)
    assert statuses == [1, 1], output
    found = settled(output)
    assert {k: v for k, v in found.items() if v != "ok"} == {
        "environment": "failed",
        "network": "failed",
        "disk": "failed",
        "one step": "skipped",
    }, output
    host = socket.gethostname()
    assert f"rank 1 (host {host}) has other" in advice_on(output, "environment")
    assert "the sum of 1 MiB over 2 ranks is wrong on rank 0" in advice_on(output, "network")
    assert f"rank 1 (host {host}): it cannot see the file that rank 0 wrote" in advice_on(output, "disk")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_in_a_step_is_named_while_the_other_waits(data: Path, tmp_path: Path) -> None:
    """Rank 0 waits in a collective beyond the time limit for ranks to exit."""
    statuses, output = look_on_two(data, tmp_path / "run", FAILING, timeout_s=2 * TIMEOUT_S)
    assert statuses == [1, 1], output
    assert settled(output) == FINE | {"one step": "failed"}
    assert f"rank 1 (host {socket.gethostname()}): RuntimeError: planted" in advice_on(output, "one step")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_failing_rank_of_a_launcher_is_named(data: Path, tmp_path: Path, launcher: str) -> None:
    """The first rank to exit terminates all; by then rank 0 has printed its table."""
    script = tmp_path / "worker.py"
    code = f"import os, sys\nsys.path[0] = {str(ROOT)!r}\n{SMALL_AND_SHORT}"
    code += f"if os.environ.get('LOCAL_RANK') == '1':\n    exec({FAILING!r})\n"
    script.write_text(f"{code}from pretrain import fabric_train\nfabric_train.leave(fabric_train.main())\n")
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"] if launcher == "torchrun" else []
    done = subprocess.run(
        [sys.executable, *words, script, *flags(data, tmp_path / "run", devices=2, timeout_s=500), "--preflight"],
        capture_output=True,
        text=True,
        timeout=240,  # less than the timeout of the collective in which rank 0 waits
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert settled(done.stdout) == FINE | {"one step": "failed"}
    assert f"rank 1 (host {socket.gethostname()}): RuntimeError: planted" in advice_on(done.stdout, "one step")
    assert not (tmp_path / "run").exists()


# --- each item fails once -------------------------------------------------------------------------------------------


def test_missing_devices(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are CUDA devices here")
    status, output = look(capsys, data, tmp_path / "run", accelerator="cuda", devices=8, train__global_batch_samples=16)
    assert status == 1
    assert "finds no CUDA device here" in advice_on(output, "devices")
    wanted = {"devices": "failed", "network": "skipped", "memory": "skipped", "one step": "skipped"}
    assert settled(output) == FINE | wanted
    assert "state" in advice_on(output, "memory"), "the estimate must not need a device"


def test_too_many_devices(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--devices 8 on a machine with 4 (faked here): the number is named."""
    monkeypatch.setattr("pretrain.parallel.device_kind", lambda args: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a CUDA build would look for them
    status, output = look(capsys, data, tmp_path / "run", devices=8, train__global_batch_samples=16)
    assert status == 1 and "--devices 8: this machine has 4 GPUs" in advice_on(output, "devices")
    assert verdicts(output)["data"] == verdicts(output)["disk"] == "ok"


def test_batch_arithmetic(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = look(capsys, data, tmp_path / "run", train__global_batch_samples=9)
    assert status == 1 and "the nearest are 8 or 10" in advice_on(output, "devices")


class TwoRanks(Ranks):
    """Two ranks as the network item sees them, each with its measurements."""

    def __init__(self, *measured: list[tuple[float, bool]]) -> None:
        super().__init__(None, timedelta(seconds=1))
        self.measured, self.world_size, self.fabric = measured, 2, object()  # type: ignore[assignment]

    def watched(self, work: Any, give_up: Any) -> Any:
        return [Outcome(rank, f"host{rank}", None, m) for rank, m in enumerate(self.measured)]


def test_slow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of bandwidths, with limits just below and just above the measurement."""
    monkeypatch.setattr(preflight_checks.dist, "get_backend", lambda: "gloo")
    ranks = TwoRanks([(0.001, True), (0.05, True)], [(0.001, True), (0.1, True)])
    s = PreflightContext(fabric_train.parse(flags(Path("d"), Path("r"))), ranks)
    bus = (16 << 20) / 0.1 / 1e9  # of the slower rank; the factor 2 (n - 1) / n is 1
    monkeypatch.setitem(preflight_checks.LEAST_BUS_GBS, "gloo", bus * 0.99)
    finding = check_network(s)
    assert finding.verdict == "ok" and f"16 MiB {bus:.3f} GB/s (bus {bus:.3f})" in finding.measured
    monkeypatch.setitem(preflight_checks.LEAST_BUS_GBS, "gloo", bus * 1.01)
    finding = check_network(s)
    assert finding.verdict == "failed" and "is expected" in finding.measured


def test_run_folder_that_would_be_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    status, output = look(capsys, data, run)
    assert status == 1 and "holds a run already" in advice_on(output, "run folder")
    assert verdicts(output)["one step"] == "ok"
    (run / "iter-00000004-ckpt.pth").write_bytes(b"not a checkpoint")
    before = contents(run)
    status, output = look(capsys, data, run, resume="latest")
    assert status == 1 and "it is damaged" in advice_on(output, "run folder")
    assert contents(run) == before


def test_full_disk(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system of 2 MB, too small for the two checkpoints of keep_last 1."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        status, output = look(capsys, data, small / "run", model__n_embd=192, save__keep_last=1)
        line = advice_on(output, "disk")
        assert status == 1 and "2 checkpoints" in line and "--save.keep_last" in line
        assert settled(output) == FINE | {"network": "skipped", "disk": "failed"}
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_space_for_checkpoints_and_cache(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps, a checkpoint every 4, and one in flight: 4 checkpoints. The cache is at most as large as the data."""
    args = fabric_train.parse(flags(data, tmp_path))
    wanted = 4 * preflight_checks.checkpoint_bytes(model_config(args, 96), args.optim)
    free = wanted - 1
    monkeypatch.setattr(preflight_checks, "free_bytes", lambda folder: 100 if folder == cache else free)
    cache = tmp_path / "cache"
    cache.mkdir()
    status, output = look(capsys, data, tmp_path / "run")
    assert status == 1 and "4 checkpoints of" in advice_on(output, "disk")
    free = wanted
    status, output = look(capsys, data, tmp_path / "run")
    assert status == 0 and verdicts(output)["disk"] == "ok"
    status, output = look(capsys, data, tmp_path / "run", data__cache_dir=cache, data__cache_gb=1)
    assert status == 1 and f"--data.cache_dir {cache} has room for" in advice_on(output, "disk")


def test_out_dir_that_cannot_be_written(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status, output = look(capsys, data, tmp_path / "file" / "run")
    assert status == 1 and "NotADirectoryError" in advice_on(output, "disk") and verdicts(output)["one step"] == "ok"


def test_data_of_another_tokenizer(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "val", [30, 40])
    manifest = tmp_path / "val" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["tokenizer"]["fingerprint"] = "another"
    manifest.write_text(json.dumps(content))
    status, output = look(capsys, data, tmp_path / "run", data__val=tmp_path / "val")
    assert status == 1 and "another tokenizer" in advice_on(output, "data")
    assert "data failed" in advice_on(output, "one step") and verdicts(output)["disk"] == "ok"


def test_data_with_a_flipped_bit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = sorted((tmp_path / "data" / "train").glob("*.bin"))[-1]
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    status, output = look(capsys, tmp_path / "data", tmp_path / "run")
    assert status == 1 and shard.name in advice_on(output, "data") and "checksum" in advice_on(output, "data")


def test_it_removes_what_a_killed_one_left(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = tmp_path / "run" / ".preflight.abc.tmp"
    leftover.mkdir(parents=True)
    (leftover / "speed-0").touch()
    status, _ = look(capsys, data, tmp_path / "run")
    assert status == 0 and list((tmp_path / "run").iterdir()) == []


def test_more_tokens_than_the_data_supports(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = look(capsys, data, tmp_path / "run", train__max_steps=None, train__max_tokens=100_000)
    assert status == 0 and advice_on(output, "data").startswith("warning") and "epochs" in advice_on(output, "data")


def test_model_too_large_is_refused_before_it_is_built(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_run, "set_up", lambda args: pytest.fail("nothing may be allocated"))
    monkeypatch.setattr("pretrain.free_memory.host_memory_bytes", lambda: 24 << 30)
    large: dict[str, Any] = dict.fromkeys(f for f in map(str, flags_of_model()))
    status, output = look(capsys, data, tmp_path / "run", **large, model__name="LLaMmlein_7B", train__block_size=2048)
    line = advice_on(output, "memory")
    assert status == 1 and "of 24.00 GiB" in line and "--train.activation_checkpointing full takes" in line
    assert "larger than the memory" in advice_on(output, "one step")


def flags_of_model() -> list[str]:
    return [f"model__{f}" for f in ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size")]


def test_memory_of_control_groups(tmp_path: Path) -> None:
    """The minimum of available memory and the limits of all parent groups; the page cache counts as free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   5000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/task\n")
    assert host_memory_bytes(tmp_path) == 5000 * 1024
    task = tmp_path / "sys/fs/cgroup/job/task"
    task.mkdir(parents=True)
    for folder, limit, used, cache in ((task, "max", 7, 0), (task.parent, str(3_000_000), 1_000_000, 400_000)):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    assert host_memory_bytes(tmp_path) == 2_400_000


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("planted"), "RuntimeError: planted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--train.micro_batch_samples 1 takes"),
    ],
)
def test_step_that_raises(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def train_step(run: Any, data: Any) -> None:
        raise error

    monkeypatch.setattr(preflight_run, "train_step", train_step)
    status, output = look(capsys, data, tmp_path / "run")
    assert status == 1 and message in advice_on(output, "one step")
    assert not (tmp_path / "run").exists()


def test_step_that_is_not_finite(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = look(capsys, data, tmp_path / "run", optim__lr=1e30, optim__warmup_steps=0)
    assert (
        status == 1 and "not finite" in advice_on(output, "one step") and "--optim.lr" in advice_on(output, "one step")
    )


def test_folder_for_temporary_files(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    status, output = look(capsys, data, tmp_path / "run")
    assert (
        status == 1 and "nowhere" in advice_on(output, "environment") and "TMPDIR" in advice_on(output, "environment")
    )
