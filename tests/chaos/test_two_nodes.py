"""Two hosts, torchrun on each: training resumes after the loss of a host, of the network between them, or of a rank.

The hosts are network namespaces joined by a veth pair, so they share only files. Where namespaces are not permitted,
two launchers on addresses of the loopback device take their place, and the test that cuts the network is skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, flags, metrics, train, write_dataset

from lit_data.record.trace import open_run
from lit_data.record.verify import verify
from lit_model.load import Checkpoint

STEPS, EVERY = 120, 5
LAST = f"iter-{STEPS:08d}-ckpt.pth"
MARK = "LLAMMLEIN_TEST_HOST"
HANG_S = 8
ENDED_S = 90  # time limit for the ranks of a host to exit after losing the other, on a busy machine
CHANGES: dict[str, dict[str, object]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp", "save__state_dict_type": "sharded"},
}
numbers = itertools.count()


class Host:
    """A place to start torchrun in; `enter` is the command prefix that enters it."""

    def __init__(self, number: int, address: str, interface: str, enter: list[str]) -> None:
        self.number, self.address, self.interface, self.enter = number, address, interface, enter
        self.name = f"{os.getpid()}-{number}"
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the test
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: list[str], master: str, port: int, devices: int, max_restarts: int) -> None:
        # Host names do not resolve here: each side gets its own address, and which of them hosts the store.
        command = [
            *self.enter, sys.executable, "-m", "torch.distributed.run",
            "--nnodes=2", f"--nproc-per-node={devices}", f"--max-restarts={max_restarts}", "--monitor-interval=0.2",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={master}:{port}", "--rdzv-id=test",
            f"--rdzv-conf=is_host={1 - self.number},read_timeout=20,join_timeout=120", f"--local-addr={self.address}",
            str(ROOT / "pretrain" / "fabric_train.py"), *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface, MARK: self.name}
        # Otherwise a launcher started later never learns the address of the shared store (torch 2.13).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.output.seek(0)
        self.output.truncate()
        self.process = subprocess.Popen(command, stdout=self.output, stderr=self.output, env=environment)

    def pids(self) -> list[int]:
        """All processes of this host."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and f"{MARK}={self.name}\0".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def workers(self) -> list[int]:
        """The ranks' processes."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(w.endswith(b"fabric_train.py") for w in words[:3]):
                    found.append(pid)
        return found

    def lose(self) -> None:
        """Kill all its processes."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.end(10)

    def end(self, timeout_s: float) -> int:
        """Wait for its launcher. Returns the status."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def read_logs(self) -> str:
        self.output.flush()
        return Path(f"/proc/self/fd/{self.output.fileno()}").read_text(errors="replace")


class Hosts:
    """The two hosts, and the network between them."""

    def __init__(self, one: Host, two: Host, cut: Callable[[bool], None] | None) -> None:
        self.both, self.cut = (one, two), cut
        self.port = 20000 + os.getpid() % 9000

    def start(self, arguments: list[str], devices: int = 1, max_restarts: int = 0) -> None:
        self.port += 1
        for host in self.both:
            self.start_one(host, arguments, devices, max_restarts)

    def start_one(self, host: Host, arguments: list[str], devices: int = 1, max_restarts: int = 0) -> None:
        host.start(arguments, self.both[0].address, self.port, devices, max_restarts)

    def read_logs(self) -> str:
        return "\n".join(f"--- host {host.number}\n{host.read_logs()[-6000:]}" for host in self.both)

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 150
        while not path.exists():
            assert time.monotonic() < deadline, self.read_logs()
            assert all(host.process is not None and host.process.poll() is None for host in self.both), self.read_logs()
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait until both finish."""
        for host in self.both:
            try:
                status = host.end(200)
            except subprocess.TimeoutExpired:
                pytest.fail(f"the run does not end\n{self.read_logs()}")
            assert status == 0, self.read_logs()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    number = next(numbers)
    names = [f"ll{os.getpid()}n{number}{side}" for side in "ab"]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode == 0 if ip() else False
    if made:
        found = two_namespaces(names)
    else:
        one, two = (Host(i, f"127.0.0.{2 + i}", "lo", []) for i in range(2))
        found = Hosts(one, two, None)
    try:
        yield found
    finally:
        for host in found.both:
            if host.process is not None:
                host.lose()
            host.output.close()
        if made:
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], check=False)


def ip() -> bool:
    return subprocess.run(["sh", "-c", "command -v ip"], capture_output=True).returncode == 0


def two_namespaces(names: list[str]) -> Hosts:
    """Create the second namespace and the pair of devices; the first namespace exists already."""
    subprocess.run(["ip", "netns", "add", names[1]], check=True)
    a, b = (f"v{name[2:]}" for name in names)
    subprocess.run(
        ["ip", "link", "add", a, "netns", names[0], "type", "veth", "peer", b, "netns", names[1]], check=True
    )
    both = []
    for i, (name, device) in enumerate(zip(names, (a, b), strict=True)):
        inside = ["ip", "-n", name]
        subprocess.run([*inside, "address", "add", f"10.234.0.{1 + i}/24", "dev", device], check=True)
        subprocess.run([*inside, "link", "set", device, "up"], check=True)
        subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        both.append(Host(i, f"10.234.0.{1 + i}", device, ["ip", "netns", "exec", name]))

    def cut(away: bool) -> None:
        subprocess.run(["ip", "-n", names[1], "link", "set", b, "down" if away else "up"], check=True)

    return Hosts(both[0], both[1], cut)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    lengths = np.random.default_rng(7).integers(1, 90, size=90).tolist()
    write_dataset(folder / "train", lengths)
    write_dataset(folder / "val", lengths[:9], seed=1)
    return folder


def arguments(data: Path, run: Path, kind: str, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        **CHANGES[kind],
        "resume": "auto",
        "model__dropout": 0.1,
        "train__max_steps": STEPS,
        "save__every_steps": EVERY,
        "eval__every_steps": 50,
        "guard__hang_timeout_s": HANG_S,
        "num_nodes": 2,
    }
    return flags(data, run, **(settings | changes))


def check(data: Path, run: Path, folder: Path, kind: str, devices: int = 1) -> None:
    """The run equals an undisturbed one with the same number of processes on one host, and its record is exact."""
    whole = folder / "whole"
    train(*arguments(data, whole, kind, num_nodes=1, devices=2 * devices))
    one, two = Checkpoint(whole / LAST), Checkpoint(run / LAST)
    assert two.verify() == [] and sorted(one.names()) == sorted(two.names())
    for name in one.names():
        assert torch.equal(one.tensor(name), two.tensor(name)), name
    assert [row["train_loss"] for row in metrics(whole)] == [row["train_loss"] for row in metrics(run)]
    assert verify(open_run(run)) == []


@pytest.mark.chaos
def test_killed_rank_is_restarted_by_torchrun(hosts: Hosts, data: Path, tmp_path: Path) -> None:
    """With --max-restarts 1 both launchers restart their ranks, which resume the newest checkpoint."""
    run = tmp_path / "run"
    hosts.start(arguments(data, run, "ddp"), max_restarts=1)
    hosts.wait_for(run / "iter-00000010-ckpt.pth")
    (worker,) = hosts.both[1].workers()
    os.kill(worker, signal.SIGKILL)
    hosts.finish()
    assert "resumed after step" in hosts.read_logs(), hosts.read_logs()
    check(data, run, tmp_path, "ddp")


@pytest.mark.chaos
@pytest.mark.parametrize(("kind", "devices", "how"), [("ddp", 1, "cut"), ("fsdp", 1, "killed"), ("fsdp", 2, "cut")])
def test_a_lost_host_ends_the_other_and_both_resume(
    hosts: Hosts, data: Path, tmp_path: Path, kind: str, devices: int, how: str
) -> None:
    run = tmp_path / "run"
    begin = arguments(data, run, kind, devices=devices)
    hosts.start(begin, devices)
    hosts.wait_for(run / "iter-00000010-ckpt.pth")
    began = time.monotonic()
    if how == "killed":
        hosts.both[1].lose()
    elif hosts.cut is None:
        pytest.skip("network namespaces may not be made here")
    else:
        hosts.cut(True)
    left = hosts.both[:1] if how == "killed" else hosts.both
    while any(host.workers() for host in left):
        assert time.monotonic() - began < ENDED_S, hosts.read_logs()
        time.sleep(0.2)
    print(f"{kind} {devices} {how}: the ranks have ended after {time.monotonic() - began:.1f} s")
    for host in left:
        assert "no heartbeat" in host.read_logs() or "the run hangs" in host.read_logs(), host.read_logs()
    assert hosts.both[0].end(ENDED_S) != 0
    # Without the network, the launcher that does not host the rendezvous store may wait for it for a long time.
    hosts.both[1].lose()
    if how == "cut":
        assert hosts.cut is not None
        hosts.cut(False)
    hosts.start(begin, devices)
    hosts.finish()
    assert "resumed after step" in hosts.read_logs()
    check(data, run, tmp_path, kind, devices)


@pytest.mark.chaos
def test_the_launcher_waits_for_a_host_that_comes_back(hosts: Hosts, data: Path, tmp_path: Path) -> None:
    """With restarts remaining, the other host's launcher waits, and the lost host joins it when restarted."""
    run = tmp_path / "run"
    begin = arguments(data, run, "fsdp")
    hosts.start(begin, max_restarts=3)
    hosts.wait_for(run / "iter-00000010-ckpt.pth")
    hosts.both[1].lose()
    time.sleep(1)
    hosts.start_one(hosts.both[1], begin, max_restarts=3)
    hosts.finish()
    assert "resumed after step" in hosts.read_logs()
    check(data, run, tmp_path, "fsdp")
