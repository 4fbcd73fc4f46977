"""The trainers of tokenizers and sentencepiece with this project's settings: from text to the content of a file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

EOS, BOS, PAD, UNK = "</s>", "<s>", "<pad>", "<unk>"
BYTE_BPE_SPECIALS = (EOS, BOS, PAD)
SENTENCEPIECE_SPECIALS = (UNK, BOS, EOS, PAD)
SENTENCEPIECE_ROLES = {"unk": UNK, "bos": BOS, "eos": EOS, "pad": PAD}

# Units within which BPE may merge. As in the tokenizers of GPT-4 and Llama 3: English clitics, a word with the
# character before it, up to three digits, punctuation with line ends, line ends, spaces. Combining marks belong to
# their word.
WORDS = "|".join(
    (
        r"'(?i:s|t|m|d|ll|re|ve)(?![\p{L}\p{M}])",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def byte_bpe(vocab_size: int, special_tokens: Sequence[str], show_progress: bool, pieces: Iterator[str]) -> bytes:
    """The content of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.encode_special_tokens = True  # `</s>` in the corpus is ordinary text here too
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BYTE_BPE_SPECIALS, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(pieces, trainer)
    return backend.to_str(pretty=True).encode()


def sentencepiece_bpe(
    vocab_size: int, special_tokens: Sequence[str], line_bytes: int, source: str, lines: Iterator[str]
) -> bytes:
    """The content of a tokenizer.model.

    Args:
        line_bytes: size of the longest line.
        source: names the text in errors.

    Raises ValueError if sentencepiece cannot train on it.
    """
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = {f"{n}_id": SENTENCEPIECE_SPECIALS.index(t) for n, t in SENTENCEPIECE_ROLES.items()}
    settings |= {f"{name}_piece": token for name, token in SENTENCEPIECE_ROLES.items()}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=line_bytes,
            hard_vocab_limit=False,  # fewer ids if the text does not support more
            control_symbols=list(special_tokens),
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        if found := re.search(r"smaller than required_chars\D+\d+\D+(\d+)", str(error)):
            raise ValueError(
                f"--vocab_size {vocab_size} is too small: bytes, special tokens and frequent characters of {source} "
                f"take {found.group(1)}; give more"
            ) from error
        raise ValueError(f"sentencepiece can't train on {source}: {error}") from error
    return model.getvalue()
