"""Sample OUTPUT/train.jsonl and OUTPUT/val.jsonl from a grammar of known entropy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_data.corpus.synthetic import LEVELS, entropy_per_document, words_per_document, write_synthetic
from pretrain.cli.command_line import ScriptParser


def parser() -> ScriptParser:
    top = ScriptParser(description=__doc__)
    top.add_argument("--output", type=Path, required=True, help="folder to create; it must not exist")
    top.add_argument("--tokens", type=int, required=True, help="words in both files together, approximately")
    top.add_argument("--level", choices=LEVELS, default="simple", help="(default simple)")
    top.add_argument("--seed", type=int, required=True)
    top.add_argument("--val_fraction", type=float, default=0.1, help="share of the words in val.jsonl (default 0.1)")
    return top


def describe(path: Path) -> str:
    documents = words = size = 0
    nll = 0.0
    with open(path, encoding="utf-8") as file:
        for document in map(json.loads, file):
            documents += 1
            words += len(document["text"].split())
            size += len(document["text"].encode())
            nll += document["nll"]
    return (
        f"{path}: {documents} documents, {words} words, {size} bytes of text, "
        f"NLL {nll / documents:.3f} nats per document, {nll / words:.4f} per word"
    )


def main() -> int:
    args = parser().parse_args()
    try:
        paths = write_synthetic(
            args.output, tokens=args.tokens, level=args.level, seed=args.seed, val_fraction=args.val_fraction
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(describe(path))
    nats, words = entropy_per_document(args.level), words_per_document(args.level)
    print(f"entropy of level {args.level}: {nats:.3f} nats per document, {nats / words:.4f} per word")
    return 0


if __name__ == "__main__":
    sys.exit(main())
