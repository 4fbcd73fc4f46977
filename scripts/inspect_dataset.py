"""Show the contents of a packed dataset: totals, document lengths, sources, duplicate ids, samples; verify every file.

python scripts/inspect_dataset.py data/train --samples 3 --picture lengths.png
python scripts/inspect_dataset.py data/train --verify       # exits with 1 if a file is damaged
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import PICTURES, ScriptParser, check_file, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> int:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("dataset", type=Path, metavar="DATASET", help="the folder with manifest.json")
    add("--verify", action="store_true", help="compare every file with its checksum, and only this")
    add("--samples", type=int, default=0, metavar="N", help="show the beginnings of N documents")
    add("--seed", type=int, default=0, metavar="S", help="of the choice of the samples (default: %(default)s)")
    add("--max_chars", type=int, default=400, metavar="N", help="characters shown of a sample (default: %(default)s)")
    add("--tokenizer", metavar="PATH", help="decodes the samples, if the dataset has no tokenizer beside it")
    add("--picture", type=Path, metavar="FILE", help="a .png, .pdf or .svg to draw the lengths to (needs matplotlib)")
    add("--sources", type=int, default=20, metavar="N", help="show the N largest sources (default: %(default)s)")
    add("--temporary", type=Path, metavar="DIR", help="where DuckDB puts data beyond 1 GB of memory")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    check_file("--picture", args.picture, *PICTURES)
    from lit_data.packed.reader import PackedDataset
    from lit_data.packed.summary import draw_lengths, faults_of, take_inventory

    if args.verify:
        faults = faults_of(args.dataset)
        if args.json:
            print(json.dumps({"folder": str(args.dataset), "faults": faults}, ensure_ascii=False))
        else:
            verdict = f"{len(faults)} faults; prepare it again" if faults else "no fault"
            print("\n".join([*faults, f"{args.dataset}: {verdict}"]))
        return 1 if faults else 0
    inventory = take_inventory(
        PackedDataset(args.dataset),
        sources=args.sources,
        samples=args.samples,
        seed=args.seed,
        max_chars=args.max_chars,
        tokenizer=args.tokenizer,
        temporary=args.temporary,
    )
    if args.picture is not None:
        draw_lengths(inventory.lengths, str(args.dataset), args.picture)
    print(json.dumps(inventory.to_dict(), ensure_ascii=False) if args.json else inventory)
    return 0


if __name__ == "__main__":
    run_script(main, "interrupted")
