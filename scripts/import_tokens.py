"""Make a packed dataset from token files written by other programs.

    python scripts/import_tokens.py --input megatron/corpus_text_document --tokenizer tokenizer/ --output data/train

Reads Megatron's .bin/.idx (linked, not copied, if the .bin is usable as is), datatrove's .ds, chunks of lit-gpt and
TinyLlama (LITPKDS), shards of llm.c and modded-nanogpt, .npy, flat .bin and .npy (with --dtype; nanoGPT's, OLMo's), and
folders of these. Each id is checked against the vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from lit_data.packed.import_settings import ImportSettings


def main() -> None:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    parser.add_fields(ImportSettings)
    settings = ImportSettings(**given_fields(ImportSettings, parser.parse_args()))
    from lit_data.packed.token_import import import_tokens

    print(import_tokens(settings).summary())


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
