"""Make a packed dataset from token files written by other programs.

    python scripts/import_tokens.py --input megatron/corpus_text_document --tokenizer tokenizer/ --output data/train

Reads Megatron's .bin/.idx (linked, not copied, if the .bin is usable as is), datatrove's .ds, chunks of lit-gpt and
TinyLlama (LITPKDS), shards of llm.c and modded-nanogpt, .npy, flat .bin and .npy (with --dtype; nanoGPT's, OLMo's), and
folders of these. Each id is checked against the vocabulary.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_data.packed.token_files import FLAT_DTYPES
from lit_data.packed.token_import import Cutting, import_tokens
from pretrain.cli.command_line import ScriptParser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, Megatron's common prefix, folders")
    add("--output", required=True, metavar="DIR", help="folder of the dataset; it must not exist")
    add("--tokenizer", metavar="PATH", help="the tokenizer that made the ids: a folder or file; copied to OUTPUT")
    add("--eos_token", metavar="TOKEN", help="the token that ends a document, where the tokenizer does not say")
    add("--vocab_size", type=int, metavar="N", help="without --tokenizer: ids lie below it")
    add("--eos_id", type=int, metavar="ID", help="without --tokenizer: the id that ends a document")
    add("--bos", action="store_true", help="each document begins with the tokenizer's BOS, which is checked")
    add("--dtype", choices=FLAT_DTYPES, help="of flat .bin files, and of .npy without a header")
    add(
        "--split_at",
        type=int,
        metavar="ID",
        help="the id between documents in files without an index; left out if it is not EOS (if it is BOS, say)",
    )
    add("--document_tokens", type=int, metavar="N", help="instead, cut such files into documents of N tokens")
    add(
        "--across_files",
        action="store_true",
        help="with --split_at: a document may begin in one file and end in the next, as in legacy chunks",
    )
    add("--append_eos", action="store_true", help="append EOS where a document lacks it; without this, it is an error")
    add("--copy", action="store_true", help="never link the source's files")
    add("--shard_tokens", type=int, default=1 << 31, metavar="N", help="tokens a shard (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        report = import_tokens(
            args.input,
            args.output,
            tokenizer_path=args.tokenizer,
            eos_token=args.eos_token,
            vocab_size=args.vocab_size,
            eos_id=args.eos_id,
            bos=args.bos,
            dtype=args.dtype,
            cutting=Cutting(args.split_at, args.document_tokens, args.across_files, args.append_eos),
            copy=args.copy,
            shard_tokens=args.shard_tokens,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(report.summary())
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that partial output is removed
    sys.exit(main())
