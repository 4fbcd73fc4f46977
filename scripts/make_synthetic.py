"""Write synthetic text of exactly known probability: OUTPUT/train.jsonl and OUTPUT/val.jsonl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lit_data.corpus.synthetic import LEVELS, entropy, write_synthetic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokens", type=int, required=True, help="about how many words to write")
    parser.add_argument("--level", choices=LEVELS, default="simple", help="which grammar (default simple)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        files = write_synthetic(args.output, tokens=args.tokens, level=args.level, seed=args.seed)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in files:
        text = file.read_text(encoding="utf-8")
        print(f"{file}: {text.count(chr(10)):,} documents, {file.stat().st_size:,} bytes")
    print(f"entropy of level {args.level}: {entropy(args.level):.4f} nats a document")
    return 0


if __name__ == "__main__":
    sys.exit(main())
