"""Small tokenizers like those of chat models, with each family's components, special tokens and chat template.

`write_tokenizer(folder, family)` writes the tokenizer files of a Hugging Face folder, for "llama3", "qwen3", "gemma2"
and "smollm2"; the vocabulary comes from TEXTS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FAMILIES = ("llama3", "qwen3", "gemma2", "smollm2")
TEXTS = [
    "The user asks a question and the assistant answers it. Was ist der Sinn? 42, sagte der König.",
    "system user assistant model tool: a helpful assistant named Tiny, trained on Straßen und Bäume.",
    "def f(x):\n    return x ** 2\n\nOne, two,  three; 1234 5 67. It's don't we'll - (ok)!",
]
CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "Und auf Deutsch?"},
]
PLAIN = ["Der König sagte: 42!", "  two  spaces\n\nand lines", "It's 1234, naïve 日本 😀", "a"]

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou "
    "are a helpful assistant named Tiny<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    "\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, family: str, **changes: Any) -> Path:
    """Write a family's tokenizer; `changes` override keys of tokenizer_config.json (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, config, template, generation = {
        "llama3": _llama3, "qwen3": _qwen3, "gemma2": _gemma2, "smollm2": _smollm2,
    }[family]()  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    if family in ("qwen3", "smollm2"):  # transformers 4.56 and later write it to a separate file
        (folder / "chat_template.jinja").write_text(template)
        more = folder / "additional_chat_templates"
        more.mkdir()
        (more / "short.jinja").write_text("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    else:
        config["chat_template"] = template
    ids = {name: tokenizer.token_to_id(token) for name, token in generation.pop("tokens").items()}
    ends = [tokenizer.token_to_id(token) for token in generation.pop("ends")]
    config = {k: v for k, v in {**config, **changes}.items() if v is not None or k == "bos_token"}
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {k: config[k] for k in roles if config.get(k)}
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
        ("generation_config.json", {**generation, **ids, "eos_token_id": ends}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1))
    return folder


def _byte_level(pre: list[Any], special: list[str], normalizer: Any = None, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _split(digits: str) -> list[Any]:
    split = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated", invert=False)
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _llama3() -> tuple[Tokenizer, dict[str, Any], str, dict[str, Any]]:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(_split("{1,3}"), names, ignore_merges=True)
    bos = names[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    config = {"bos_token": bos, "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True,
              "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast",
              "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip
    generation = {"tokens": {"bos_token_id": bos}, "ends": ["<|end_of_text|>", "<|eot_id|>"], "do_sample": True,
                  "temperature": 0.6, "top_p": 0.9}  # fmt: skip
    return tokenizer, config, _LLAMA3, generation


def _qwen3() -> tuple[Tokenizer, dict[str, Any], str, dict[str, Any]]:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(_split(""), names, normalizers.NFC())
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {"add_bos_token": False, "add_prefix_space": False, "additional_special_tokens": names[1:],
              "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "errors": "replace",
              "model_max_length": 131072, "split_special_tokens": False, "clean_up_tokenization_spaces": False,
              "tokenizer_class": "Qwen2Tokenizer"}  # fmt: skip
    generation = {"tokens": {"pad_token_id": "<|endoftext|>", "bos_token_id": "<|endoftext|>"},
                  "ends": ["<|im_end|>", "<|endoftext|>"], "do_sample": True, "top_k": 20, "top_p": 0.95}  # fmt: skip
    return tokenizer, config, _CHATML, generation


def _smollm2() -> tuple[Tokenizer, dict[str, Any], str, dict[str, Any]]:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    pre = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = _byte_level(pre, names)
    config = {"add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
              "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
              "unk_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "model_max_length": 8192,
              "tokenizer_class": "GPT2Tokenizer"}  # fmt: skip
    generation = {"tokens": {"bos_token_id": "<|im_start|>", "pad_token_id": "<|im_end|>"}, "ends": ["<|im_end|>"]}
    return tokenizer, config, _SMOLLM, generation


def _gemma2() -> tuple[Tokenizer, dict[str, Any], str, dict[str, Any]]:
    """Spaces as ▁, byte fallback for characters outside the vocabulary, special tokens first in the vocabulary."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted((t for t in learned["vocab"] if t not in names), key=learned["vocab"].get)
    vocab = {name: id for id, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [tuple(m) for m in learned["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
              "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
              "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "padding_side": "left",
              "spaces_between_special_tokens": False, "use_default_system_prompt": False,
              "model_max_length": 8192, "tokenizer_class": "GemmaTokenizer"}  # fmt: skip
    generation = {"tokens": {"bos_token_id": "<bos>", "pad_token_id": "<pad>"}, "ends": ["<eos>", "<end_of_turn>"],
                  "cache_implementation": "hybrid"}  # fmt: skip
    return tokenizer, config, _GEMMA2, generation
