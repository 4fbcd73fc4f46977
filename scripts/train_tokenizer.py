"""Train a tokenizer on text.

    python scripts/train_tokenizer.py --input corpus/ --vocab_size 32000 --output tokenizer/

Reads the same formats as scripts/prepare_data.py. Writes OUTPUT/tokenizer.json (byte_bpe) or OUTPUT/tokenizer.model
(sentencepiece), and the files that define its special tokens.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_data.corpus.readers import MAX_DOCUMENT_MB, SPLITS, ReadErrors
from lit_data.tokenizers.training import KINDS, train_tokenizer
from pretrain.cli.command_line import ScriptParser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders of text")
    add(
        "--vocab_size",
        type=int,
        required=True,
        metavar="N",
        help="ids in all, bytes and special tokens counted; there are fewer where the text gives fewer",
    )
    add("--output", required=True, metavar="DIR", help="folder to write; it must not exist")
    add(
        "--type",
        choices=KINDS,
        default="byte_bpe",
        help="byte-level BPE, or sentencepiece BPE with byte fallback (default: %(default)s)",
    )
    add("--special_tokens", nargs="+", default=[], metavar="TOKEN", help="more of them, such as '<|im_start|>'")
    add(
        "--max_sample_mb",
        type=int,
        metavar="N",
        help="learn from N MB of text at most: the beginning of each file, in proportion to its size (all of it)",
    )
    add("--on_error", choices=("stop", "skip"), default="stop", help="at invalid text (default: %(default)s)")
    add("--text_field", default="text", metavar="NAME", help="JSON key or column of the text (default: %(default)s)")
    add(
        "--split_documents",
        choices=SPLITS,
        default="file",
        help="how to split plain text into documents; bounds memory for large files (default: %(default)s)",
    )
    add(
        "--max_document_mb",
        type=int,
        default=MAX_DOCUMENT_MB,
        metavar="N",
        help="refuse longer documents (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an OUTPUT that holds a tokenizer, once the new one is whole")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    errors = ReadErrors()
    try:
        tokenizer = train_tokenizer(
            args.input,
            args.vocab_size,
            args.type,
            args.output,
            special_tokens=args.special_tokens,
            max_sample_mb=args.max_sample_mb,
            overwrite=args.overwrite,
            on_error=args.on_error,
            text_field=args.text_field,
            split_documents=args.split_documents,
            max_document_mb=args.max_document_mb,
            errors=errors,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    if tokenizer.vocab_size < args.vocab_size:
        print(
            f"warning: the text gives {tokenizer.vocab_size} ids, fewer than --vocab_size {args.vocab_size}; the "
            "tokenizer is smaller accordingly",
            file=sys.stderr,
        )
    print(f"{tokenizer.path}: {tokenizer.vocab_size} ids, end of document {tokenizer.eos_token} = {tokenizer.eos_id}")
    if errors.count:
        print(f"skipped: {errors.count:,} unreadable documents, the first of them:")
        print("\n".join(f"  {message}" for message in errors.first))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that partial output is removed
    sys.exit(main())
