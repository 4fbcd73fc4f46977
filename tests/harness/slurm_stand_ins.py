"""For tests of cluster/: runs its jobs with fake SLURM and Apptainer commands (tests/scripts/fake_slurm) on PATH."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from running import ROOT

CLUSTER = ROOT / "cluster"
STAND_INS = ROOT / "tests" / "scripts" / "fake_slurm"
# Exits with the statuses in the file `statuses`, in turn; `wait` means: wait for a signal, then exit with 75.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE_SLURM/python"
[ "$SLURM_PROCID" = 0 ] || exit 0
read -r status <"$FAKE_SLURM/statuses"
sed -i 1d "$FAKE_SLURM/statuses"
if [ "$status" = wait ]; then
    trap 'echo caught USR1; exit 75' USR1
    trap 'echo caught TERM; exit 75' TERM
    touch "$FAKE_SLURM/ready"
    for _ in {1..600}; do sleep 0.05; done
fi
if [ "$status" = killed ]; then kill -KILL $$; fi
if [ "$status" = deaf ]; then
    touch "$FAKE_SLURM/ready"
    exec sleep 30
fi
exit "$status"
"""


class Cluster:
    """A checkout in `folder`, with the fake commands."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.state = folder / "checkout", folder / "slurm"
        self.state.mkdir(parents=True)
        shutil.copytree(CLUSTER, self.checkout / "cluster", ignore=shutil.ignore_patterns("env"))
        for name in (
            "pretrain",
            "scripts",
            "lit_files",
            "lit_model",
            "lit_data",
            "lit_eval",
            "configs",
            "llammlein.def",
        ):
            (self.checkout / name).symlink_to(ROOT / name)
        (self.checkout / "llammlein.sif").touch()
        self.bin = folder / "bin"
        self.bin.mkdir()
        with socket.socket() as free:  # Lightning derives the port from the job id
            for self.job in range(31000, 39000, 7):
                try:
                    free.bind(("", self.job % 10000 + 15000))
                    break
                except OSError:
                    continue
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LLAMMLEIN_", "SBATCH_"))}
        self.env |= {"FAKE_SLURM": str(self.state), "FAKE_SLURM_JOB_ID": str(self.job)}
        path = [self.bin, STAND_INS, Path(sys.executable).parent]
        self.env["PATH"] = os.pathsep.join([*map(str, path), os.environ["PATH"]])

    def fake_python(self, *statuses: object) -> None:
        """Replace `python` in the image by the fake one."""
        (self.bin / "python").write_text(PYTHON)
        (self.bin / "python").chmod(0o755)
        (self.state / "statuses").write_text("".join(f"{status}\n" for status in statuses))

    def start(self, *command: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=self.checkout, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *command: object) -> tuple[int, str]:
        """Run a command; returns (status, output of it and its jobs)."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output + self.log

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.checkout.glob("*.log")))

    def calls(self, name: str) -> list[str]:
        """Recorded calls of a fake SLURM or Apptainer command; for `python`, the calls by the tasks."""
        if name == "python":
            return (self.state / "python").read_text().splitlines()
        lines = (self.state / "calls").read_text().splitlines() if (self.state / "calls").exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def restarts(self) -> int:
        assert set(self.calls("scontrol")) <= {f"requeue {self.job}"}
        return len(self.calls("scontrol"))


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, f"the job ended: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
