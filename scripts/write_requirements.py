"""Write requirements.txt from pyproject.toml, for `pip install -r requirements.txt`.

    python scripts/write_requirements.py            # after changing the dependencies of pyproject.toml
    python scripts/write_requirements.py --check    # status 1 if the file is out of date

It lists the package's dependencies without the extras, at the tested versions of constraints.txt.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

HEAD = """\
# Written by scripts/write_requirements.py from the dependencies of pyproject.toml: change them there.
# `pip install -e .` installs the same and the package; extras: docs/install.md.
-c constraints.txt
"""


def requirements(root: Path) -> str:
    """The content of requirements.txt for the pyproject.toml in `root`."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return HEAD + "".join(f"{line}\n" for line in project["dependencies"])


def main() -> int:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if requirements.txt is out of date"
    )
    args = parser.parse_args()
    path = ROOT / "requirements.txt"
    text = requirements(ROOT)
    if args.check:
        current = path.exists() and path.read_text(encoding="utf-8") == text
        print(
            "requirements.txt is up to date" if current else "requirements.txt is out of date: run this without --check"
        )
        return 0 if current else 1
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path.name}: {len(text.splitlines()) - HEAD.count(chr(10))} requirements")
    return 0


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
