"""Run pytest on the CPUs available to this process, and list the slowest tests. Arguments are passed to pytest; `make
test` calls this.

    python scripts/run_tests.py -k loss

With --coverage (`make coverage`) the lines that the tests run are counted, those of commands and forked ranks included.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_files.platform import usable_cores

COVERAGE = [sys.executable, "-m", "coverage"]


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    cpus = usable_cores()
    # Tests start their own processes (two ranks); more workers than this would only compete for cores.
    workers = min(cpus, 8)
    env = dict(os.environ)
    # One thread per worker. Torch otherwise starts one per CPU in every process: slower, and different rounding.
    env["OMP_NUM_THREADS"] = "1"
    env.setdefault("HF_HUB_OFFLINE", "1")
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    arguments = [argument for argument in sys.argv[1:] if argument != "--coverage"]
    counted = len(arguments) < len(sys.argv[1:])
    start = [*COVERAGE, "run"] if counted else [sys.executable]
    if counted:
        shutil.rmtree(ROOT / "build" / "coverage", ignore_errors=True)
    slowest = ["--durations=30", "--durations-min=5"]
    command = [*start, "-m", "pytest", *spread, *slowest, *arguments]
    print("OMP_NUM_THREADS=1", *command[1:], flush=True)
    status = subprocess.run(command, cwd=ROOT, env=env).returncode
    if counted:
        for step in (["combine", "--quiet"], ["report", "--skip-covered", "--show-missing", "--sort=miss"]):
            status = subprocess.run([*COVERAGE, *step], cwd=ROOT).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())
