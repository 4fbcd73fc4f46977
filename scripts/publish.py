"""Publish a run's checkpoints as revisions that anyone can check, to a folder or a hub, or verify a release.

    python scripts/publish.py runs/mine --to release/
    python scripts/publish.py --verify release/

Without --to it is a dry run. To continue an interrupted publication, repeat the command.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

REPO = re.compile(r"[\w.-]+/[\w.-]+")  # NAMESPACE/NAME


def parser() -> ScriptParser:
    made = ScriptParser(description=__doc__)
    made.add_argument("run", type=Path, nargs="?", help="run folder of a finished or stopped training run")
    made.add_argument("--to", metavar="FOLDER|hub", help="where to publish (default: dry run, nothing is written)")
    made.add_argument("--repo", metavar="NAMESPACE/NAME", help="repository on the hub, also named in the card")
    made.add_argument(
        "--license", metavar="ID", help="licence of the weights, stated in the card, such as apache-2.0; a hub needs it"
    )
    made.add_argument("--public", action="store_true", help="create a public repository (default: a private one)")
    made.add_argument(
        "--training_state",
        choices=["all", "last", "none"],
        help="checkpoints published with their optimizer state, which replay.py and --resume need (default all)",
    )
    made.add_argument(
        "--verify", metavar="FOLDER|NAMESPACE/NAME", help="check a release, or a single downloaded revision"
    )
    made.add_argument(
        "--download", action="store_true", help="with --verify of a hub: download all files and check their content"
    )
    made.add_argument("--head", metavar="SHA256", help="with --verify: the expected hash of the last manifest")
    return made


def main() -> int:
    args = parser().parse_args()
    if (args.run is None) == (args.verify is None):
        raise ValueError("give either a run folder to publish, or --verify with a release")
    for flag in ("head", "download"):
        if getattr(args, flag) and args.verify is None:
            raise ValueError(f"--{flag} belongs to --verify")
    if args.to == "hub" and args.repo is None:
        raise ValueError("--to hub needs --repo NAMESPACE/NAME")
    if args.to == "hub" and args.license is None:
        raise ValueError(
            "--to hub needs --license, such as apache-2.0 or other: the card states it, and it cannot be guessed"
        )
    if args.repo is not None and not REPO.fullmatch(args.repo):
        raise ValueError(f"--repo {args.repo} must be NAMESPACE/NAME, such as my-group/my-model")
    if args.license is not None and not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", args.license):
        raise ValueError(
            f"--license {args.license!r} must be an identifier of the Hugging Face hub (lower-case letters, digits, - "
            "and .), such as apache-2.0 or other"
        )
    if args.public and args.to != "hub":
        raise ValueError("--public belongs to --to hub")
    from pretrain.release.folder import FolderRelease
    from pretrain.release.hub import Hub, HubRelease, open_hub
    from pretrain.release.manifest import counted
    from pretrain.release.publish import PublishArgs, Release, describe_plan, publish
    from pretrain.release.verify import open_folder, verify

    if args.verify is not None:
        on_hub = REPO.fullmatch(args.verify) and not Path(args.verify).exists()
        if on_hub:
            opened = open_hub(Hub(args.verify, "--verify"), download=args.download)
        else:
            opened = open_folder(Path(args.verify))
        report = verify(opened, head=args.head)
        print(*report.lines(), sep="\n")
        return 1 if report.faults else 0
    settings = PublishArgs(args.repo, args.license, args.training_state)
    if args.to is None:
        print(*describe_plan(args.run, settings), "dry run: nothing was written; publish with --to", sep="\n")
        return 0
    if args.to == "hub":
        release: Release = HubRelease(Hub(args.repo), args.run / ".publishing", public=args.public)
    else:
        release = FolderRelease(Path(args.to))
    chain = publish(args.run, release, settings)
    count, head = counted(len(chain), "revision"), chain[-1].sha256
    print(f"{args.to}: {count}; also record the head where nobody can change it, for --verify --head {head}")
    return 0


if __name__ == "__main__":
    run_script(main, RESUMES)
