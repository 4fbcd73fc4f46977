"""Publish a run's checkpoints as revisions that anyone can check, or verify such a release.

publish.py RUN                                            a dry run: what would be published
publish.py RUN --to FOLDER                                one folder a revision
publish.py --verify FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def parser() -> ScriptParser:
    made = ScriptParser(description=__doc__)
    made.add_argument("run", type=Path, nargs="?", help="run folder, whose training has ended")
    made.add_argument("--to", metavar="FOLDER", help="where to publish; without it nothing is written")
    made.add_argument("--repo", metavar="NAMESPACE/NAME", help="repository that the card names")
    made.add_argument("--license", metavar="ID", help="licence of the weights, such as apache-2.0, for the card")
    made.add_argument(
        "--training_state",
        choices=["all", "last", "none"],
        default="all",
        help="checkpoints published with their optimizer state, which replay.py and --resume need (default all)",
    )
    made.add_argument("--verify", metavar="FOLDER", help="check a release, or a single downloaded revision")
    made.add_argument("--head", metavar="SHA256", help="with --verify: the expected hash of the last manifest")
    return made


def main() -> int:
    args = parser().parse_args()
    if (args.run is None) == (args.verify is None):
        raise ValueError("give either a run folder to publish, or --verify FOLDER")
    if args.head is not None and args.verify is None:
        raise ValueError("--head belongs to --verify")
    from pretrain.release.folder import FolderRelease
    from pretrain.release.publish import PublishArgs, describe_plan, publish

    if args.verify is not None:
        from pretrain.release.verify import open_folder, verify

        report = verify(open_folder(Path(args.verify)), head=args.head)
        print(*report.lines(), sep="\n")
        return 1 if report.faults else 0
    licence = {"license": args.license} if args.license else {}
    settings = PublishArgs(args.repo, licence, args.training_state)
    if args.to is None:
        print(*describe_plan(args.run, settings), "dry run: nothing was written; publish with --to", sep="\n")
        return 0
    chain = publish(args.run, FolderRelease(Path(args.to)), settings)
    print(f"{args.to}: {len(chain)} revisions; publish the head elsewhere too, for --verify --head {chain[-1].sha256}")
    return 0


if __name__ == "__main__":
    run_script(main)
