"""Train a tokenizer on text.

    python scripts/train_tokenizer.py --input corpus/ --vocab_size 32000 --output tokenizer/

Reads the same formats as scripts/prepare_data.py. Writes OUTPUT/tokenizer.json (byte_bpe) or OUTPUT/tokenizer.model
(sentencepiece), and the files that define its special tokens.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from lit_data.tokenizers.settings import TokenizerSettings


def main() -> None:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    parser.add_fields(TokenizerSettings)
    settings = TokenizerSettings(**given_fields(TokenizerSettings, parser.parse_args()))
    from lit_data.corpus.files import ReadErrors
    from lit_data.tokenizers.training import train_tokenizer

    sys.path.append(os.getcwd())  # for the user's module:function
    errors = ReadErrors()
    tokenizer = train_tokenizer(settings, errors)
    if tokenizer.vocab_size < settings.vocab_size:
        print(
            f"warning: the text gives {tokenizer.vocab_size} ids, fewer than --vocab_size {settings.vocab_size}; the "
            "tokenizer is smaller accordingly",
            file=sys.stderr,
        )
    print(f"{tokenizer.path}: {tokenizer.vocab_size} ids, end of document {tokenizer.eos_token} = {tokenizer.eos_id}")
    if errors.count:
        print(f"skipped: {errors.count:,} unreadable documents, the first of them:")
        print("\n".join(f"  {message}" for message in errors.first))


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
