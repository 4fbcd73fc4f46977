"""Run pytest on the CPUs available to this process. Arguments are passed to pytest; `make test` calls this."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def available_cpus() -> int:
    """Number of CPUs in this process's affinity: those of the container or batch job, not of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> int:
    cpus = available_cpus()
    # Tests start their own processes (two ranks); more workers than this would only compete for cores.
    workers = min(cpus, 8)
    env = dict(os.environ)
    # One thread per worker. Torch otherwise starts one per CPU in every process: slower, and different rounding.
    env["OMP_NUM_THREADS"] = "1"
    env.setdefault("HF_HUB_OFFLINE", "1")
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    command = [sys.executable, "-m", "pytest", *spread, *sys.argv[1:]]
    print("OMP_NUM_THREADS=1", *command[1:], flush=True)
    return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
