"""Show the contents of a packed dataset: totals, document lengths, sources, duplicate ids, samples; verify every file.

python scripts/inspect_dataset.py data/train --samples 3 --picture lengths.png
python scripts/inspect_dataset.py data/train --verify       # exits with 1 if a file is damaged
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import (
    RepeatedIds,
    Sample,
    Sources,
    draw_lengths,
    faults_of,
    histogram,
    lengths_of,
    repeated_ids,
    samples_of,
    sources_of,
    tokenizer_of,
    totals,
)
from pretrain.cli.command_line import ScriptParser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("dataset", type=Path, metavar="DATASET", help="the folder with manifest.json")
    add("--verify", action="store_true", help="compare every file with its checksum, and only this")
    add("--samples", type=int, default=0, metavar="N", help="show the beginnings of N documents")
    add("--seed", type=int, default=0, metavar="S", help="of the choice of the samples (default: %(default)s)")
    add("--max_chars", type=int, default=400, metavar="N", help="characters shown of a sample (default: %(default)s)")
    add("--tokenizer", metavar="PATH", help="decodes the samples, where the dataset has no tokenizer beside it")
    add("--picture", type=Path, metavar="FILE", help="a .png, .pdf or .svg to draw the lengths to (needs matplotlib)")
    add("--sources", type=int, default=20, metavar="N", help="show the N largest sources (default: %(default)s)")
    add("--temporary", type=Path, metavar="DIR", help="where DuckDB puts what exceeds 1 GB of memory")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def verify(folder: Path, as_json: bool) -> int:
    faults = faults_of(folder)
    if as_json:
        print(json.dumps({"folder": str(folder), "faults": faults}, ensure_ascii=False))
    else:
        for fault in faults:
            print(fault)
        print(f"{folder}: {f'{len(faults)} faults; prepare it again' if faults else 'no fault'}")
    return 1 if faults else 0


def has_duckdb() -> bool:
    try:
        import duckdb  # noqa: F401
    except ImportError:
        return False
    return True


def print_report(
    facts: dict[str, Any], lengths: str, sources: Sources | None, repeated: RepeatedIds | None, samples: list[Sample]
) -> None:
    per_token = f", {facts['text_bytes'] / facts['tokens']:.3f} bytes per token" if facts["tokens"] else ""
    text = f"{facts['text_bytes']:,} bytes of text{per_token}" if facts["text_bytes"] else "bytes of text unknown"
    print(f"{facts['folder']}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {text}")
    if facts["words"] is not None:
        print(f"  {facts['words']:,} words")
    else:
        print(f"  words not counted; python scripts/count_words.py {facts['folder']} does it")
    print(f"  {facts['shards']:,} shards of {facts['dtype']}, {facts['file_bytes']:,} bytes of files")
    bos = "no BOS" if facts["bos_id"] is None else f"BOS {facts['bos_id']}"
    parsed = ", special tokens parsed" if facts["special_tokens"] == "parse" else ""
    tokenizer = facts["tokenizer"][:12]
    print(f"  vocabulary {facts['vocab_size']:,}, EOS {facts['eos_id']}, {bos}{parsed}, tokenizer {tokenizer}")
    print(f"  fingerprint {facts['fingerprint'][:12]}\n")
    print(lengths)
    if sources is not None:
        print(f"\n{'tokens':>15}  {'documents':>13}  source ({sources.count:,} in all)")
        for source in sources.largest:
            print(f"{source.tokens:>15,}  {source.documents:>13,}  {source.source}")
    if repeated is not None:
        print(f"\n{repeated.ids:,} ids repeat" + (f", in {repeated.documents:,} documents" if repeated.ids else ""))
        for id, count in repeated.most.items():
            print(f"{count:>15,}  {id}")
    if sources is None:
        print("\nsources and repeated ids are left out; they need duckdb: pip install 'llammlein[data]'")
    for sample in samples:
        place = f", {sample.place}" if sample.place else ""
        print(f"\n#{sample.number} {sample.id} ({sample.source}{place}), {sample.tokens:,} tokens")
        print(f"    {' '.join(sample.text.split())}")


def run(args: argparse.Namespace) -> int:
    if args.verify:
        return verify(args.dataset, args.json)
    for flag in ("samples", "sources", "max_chars"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag} {getattr(args, flag)}: at least 0 is needed")
    dataset = PackedDataset(args.dataset)
    tokenizer = tokenizer_of(dataset, args.tokenizer) if args.samples else None
    facts, lengths = totals(dataset), lengths_of(dataset)
    if args.picture is not None:
        draw_lengths(lengths, f"{dataset.path}", args.picture)
    sources = repeated = None
    if has_duckdb():
        sources = sources_of(dataset, args.sources, args.temporary)
        repeated = repeated_ids(dataset, temporary=args.temporary)
    samples = samples_of(dataset, tokenizer, args.samples, args.seed, args.max_chars)
    if not args.json:
        print_report(facts, histogram(lengths), sources, repeated, samples)
        return 0
    found = {
        **facts,
        "lengths": asdict(lengths),
        "sources": asdict(sources) if sources is not None else None,
        "repeated_ids": asdict(repeated) if repeated is not None else None,
        "samples": [asdict(s) for s in samples],
    }
    print(json.dumps(found, ensure_ascii=False))
    return 0


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
