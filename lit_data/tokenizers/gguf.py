"""Writes a tokenizer as GGUF metadata, so that llama.cpp encodes text as preparation did.

llama.cpp has two kinds that can give the same ids: byte-level BPE (`gpt2`), with a built-in pre-tokenizer chosen by
name; and sentencepiece BPE (`llama`), applied without normalisation.
"""

from __future__ import annotations

import json
from typing import Any

from lit_data.tokenizers.hf_export import chat_templates
from lit_data.tokenizers.sentencepiece_file import ModelType, PieceType
from lit_data.tokenizers.tokenizer import JsonTokenizer, SentencepieceTokenizer, Tokenizer
from lit_files.near_names import did_you_mean

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_NO_REGEX = {"type": "ByteLevel", "use_regex": False}
# The part of a tokenizer.json to which llama.cpp's pre-tokenizer of that name is equivalent.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": _WORDS % "{1,3}"}}, _NO_REGEX],
    "qwen2": [{"type": "Split", "pattern": {"Regex": _WORDS % ""}}, _NO_REGEX],
}

LLAMA_CPP_NAMES = (
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "chatglm-bpe", "codeshell", "cohere2moe",
    "command-r", "dbrx", "deepseek-coder", "deepseek-llm", "deepseek-r1-qwen", "deepseek-v3", "default", "exaone",
    "exaone-moe", "exaone4", "f2llmv2", "falcon", "falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "gpt-2",
    "gpt-4o", "gpt3-finnish", "granite-docling", "granite-embed-multi-311m", "granite-embed-multi-97m", "grok-2",
    "hunyuan", "hunyuan-dense", "hy_v4", "jais", "jais-2", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code",
    "jina-v2-de", "jina-v2-es", "jina-v5-nano", "joyai-llm", "kanana2", "kimi-k2", "kormo", "laguna", "lfm2",
    "llada-moe", "llama-bpe", "llama-v3", "llama3", "llama4", "megrez", "mellum", "mellum2", "midm-2.0", "minerva-7b",
    "minicpm5", "minimax-m2", "modern-bert", "mpt", "olmo", "phi-2", "pixtral", "poro-chat", "qwen2", "qwen35",
    "refact", "roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe", "smollm", "solar-open", "spark2_5", "stablelm2",
    "starcoder", "superbpe", "talkie", "tekken", "tiny_aya", "trillion", "ufakzeka", "viking", "whitespace", "youtu",
)  # fmt: skip
"""The names that llama.cpp's src/llama-vocab.cpp knows (commit 00ad355e); it refuses to load a file with another."""


def gguf_tokenizer(
    tokenizer: Tokenizer, vocab_size: int, pre_tokenizer: str | None = None, *, bos: bool = False
) -> dict[str, Any]:
    """Keys and values for a model of `vocab_size` ids; ids beyond the tokenizer's become unused tokens.

    `pre_tokenizer` is a llama.cpp name, for byte-level BPE; None: the one equivalent to the file's.
    `bos`: training documents started with BOS, so texts do too.
    Raises ValueError if llama.cpp would apply the tokenizer differently or does not know `pre_tokenizer`, or if the
    tokenizer has more ids than the model.
    """
    if pre_tokenizer is not None and pre_tokenizer not in LLAMA_CPP_NAMES:
        near = did_you_mean(pre_tokenizer, LLAMA_CPP_NAMES) or f"; it knows {', '.join(PRE_TOKENIZERS)} and others"
        raise ValueError(f"--pre_tokenizer {pre_tokenizer} is not a pre-tokenizer of llama.cpp{near}")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    if isinstance(tokenizer, SentencepieceTokenizer):
        keys = _sentencepiece(tokenizer, vocab_size)
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        keys = _byte_level_bpe(tokenizer, vocab_size, pre_tokenizer)
    for role, id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("padding", tokenizer.pad_id)):
        if id is not None:
            keys[f"{role}_token_id"] = int(id)
    keys |= {"add_bos_token": bos, "add_eos_token": False}  # as in preparation
    template = chat_templates(tokenizer).get("default")
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | (
        {"tokenizer.chat_template": template} if template is not None else {}
    )


def _padded(tokens: list[str], types: list[int], vocab_size: int) -> dict[str, Any]:
    """Tokens and their types, with sentencepiece's numbering."""
    unused = [f"[UNUSED{id}]" for id in range(len(tokens), vocab_size)]
    return {"tokens": tokens + unused, "token_type": types + [int(PieceType.UNUSED)] * len(unused)}


def _sentencepiece(tokenizer: SentencepieceTokenizer, vocab_size: int) -> dict[str, Any]:
    content = tokenizer.content
    obstacles = {
        "is no BPE": content.model_type != ModelType.BPE,
        f"normalises ({content.normalizer_name})": bool(content.precompiled_charsmap),
        "removes spaces": content.remove_extra_whitespaces,
        "has spaces at the end of words": content.treat_whitespace_as_suffix,
        "has no bytes to fall back on": not content.byte_fallback,
    }
    found = [obstacle for obstacle, applies in obstacles.items() if applies]
    if found:
        raise ValueError(f"{tokenizer.path} {', '.join(found)}: llama.cpp would give other ids")
    pieces = content.pieces
    keys = _padded([p.text for p in pieces], [int(p.type) for p in pieces], vocab_size)
    scores = [float(p.score) for p in pieces] + [-1e4] * (vocab_size - len(pieces))
    unknown = next((id for id, p in enumerate(pieces) if p.type == PieceType.UNKNOWN), 0)
    prefix = content.add_dummy_prefix
    return {"model": "llama", "pre": "default", **keys, "scores": scores, "unknown_token_id": unknown} | {
        "add_space_prefix": prefix
    }


def _byte_level_bpe(tokenizer: JsonTokenizer, vocab_size: int, pre_tokenizer: str | None) -> dict[str, Any]:
    content = tokenizer.content
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
        raise ValueError(f"{tokenizer.path} is not a byte-level BPE; GGUF supports no other kind of tokenizer.json")
    if content.get("normalizer") is not None:
        raise ValueError(
            f"{tokenizer.path} has a normalizer, which llama.cpp does not support: it would give other ids"
        )
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    by_id = {id: token for token, id in model["vocab"].items()} | {id: t["content"] for id, t in added.items()}
    special = {True: int(PieceType.CONTROL), False: int(PieceType.USER_DEFINED)}
    tokens, types = [], []
    for id in range(tokenizer.vocab_size):
        tokens.append(by_id.get(id, f"[UNUSED{id}]"))
        kind = PieceType.NORMAL if id in by_id else PieceType.UNUSED
        types.append(special[bool(added[id].get("special"))] if id in added else int(kind))
    pre = pre_tokenizer or _pre_tokenizer_of(tokenizer)
    return {"model": "gpt2", "pre": pre, **_padded(tokens, types, vocab_size), "merges": merges}


def _pre_tokenizer_of(tokenizer: JsonTokenizer) -> str:
    """The name of llama.cpp's pre-tokenizer that is equivalent to the file's."""
    described = tokenizer.content["pre_tokenizer"]
    parts = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    for name, wanted in PRE_TOKENIZERS.items():
        if len(parts) == len(wanted) and all(_matches(*pair) for pair in zip(parts, wanted, strict=True)):
            return name
    raise ValueError(
        f"{tokenizer.path} splits words like none of the known pre-tokenizers of llama.cpp "
        f"({', '.join(PRE_TOKENIZERS)}); --pre_tokenizer names one to use nevertheless, which gives some texts other "
        "ids than in training (llama-bpe is nearest to the tokenizers trained by "
        "scripts/train_tokenizer.py: it differs at combining marks and at words such as 'tis)"
    )


def _matches(part: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a part of a tokenizer.json is equivalent to the wanted one, absent keys having their defaults."""
    defaults = {"use_regex": True, "add_prefix_space": False, "invert": False}
    given = {**defaults, **part}
    return all(given.get(key) == value for key, value in wanted.items()) and not (
        given["add_prefix_space"] or given["invert"] or given.get("behavior", "Isolated") != "Isolated"
    )
