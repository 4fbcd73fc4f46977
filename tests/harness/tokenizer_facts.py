"""Prints what transformers reads from a folder's tokenizer, as JSON; a script, so as to test other versions of it.

python tests/harness/tokenizer_facts.py FOLDER '[["plain text"], [{"role": "user", "content": "..."}]]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def describe(folder: Path, plain: list[str], chat: list[dict[str, str]]) -> dict[str, Any]:
    """Ids of texts and of a chat, the special tokens, and their settings in the configs."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    more = sorted(p.stem for p in Path(folder).glob("additional_chat_templates/*.jinja"))
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    generation = GenerationConfig.from_pretrained(folder)
    return {
        "template": tokenizer.get_chat_template(),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False),
        "prompt": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "chat_ids": list(ids if isinstance(ids, list) else ids["input_ids"]),
        "short": [tokenizer.apply_chat_template(chat, tokenize=False, chat_template=name) for name in more],
        "eos": tokenizer.eos_token,
        "eos_id": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token,
        "bos_id": tokenizer.bos_token_id,
        "ended": [tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for text in plain],
        "plain_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in plain],
        "ids": [tokenizer(text)["input_ids"] for text in plain],
        "config_bos_id": AutoConfig.from_pretrained(folder).bos_token_id,
        "generation_bos_id": generation.bos_token_id,
        "ends": generation.eos_token_id,
        "generation": generation.to_diff_dict(),
    }


if __name__ == "__main__":
    print(json.dumps(describe(Path(sys.argv[1]), *json.loads(sys.argv[2]))))
