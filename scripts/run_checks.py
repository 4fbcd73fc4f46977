"""Run lint, format check and type check, all even if one fails. `make check` calls this.

python scripts/run_checks.py
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

PACKAGES = ("lit_files", "lit_model", "lit_data", "lit_eval", "pretrain", "scripts")
CHECKS = (
    ("ruff", "check", "."),
    # Text files are opened with an encoding: the default of Windows is not UTF-8.
    ("ruff", "check", "--preview", "--select", "PLW1514", *PACKAGES),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    failed = []
    for check in CHECKS:
        print("python -m", *check, flush=True)
        if subprocess.run([sys.executable, "-m", *check], cwd=ROOT).returncode:
            failed.append(" ".join(check))
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
