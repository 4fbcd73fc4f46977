"""Examine this machine: Python, torch and its devices, attention kernel, compiler, threads, memory, disk.

    python scripts/doctor.py        # or: make doctor

One line an item, with a remedy where something is wrong; exits with 1 if an item failed. What a particular run needs is
checked by `python pretrain/fabric_train.py --preflight ...`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> int:
    ScriptParser(description=__doc__).parse_args()
    from pretrain.preflight.doctor import examine

    failed = False
    for name, finding in examine():
        failed |= finding.verdict == "failed"
        advice = f" -> {finding.advice}" if finding.advice else ""
        print(f"{finding.verdict:8} {name:11} {finding.measured}{advice}", flush=True)
    return int(failed)


if __name__ == "__main__":
    run_script(main, "interrupted")
