"""Run pytest on the CPUs available to this process. Arguments are passed to pytest; `make test` calls this."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_files.cores import usable_cores


def main() -> int:
    cpus = usable_cores()
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
    sys.exit(main())
