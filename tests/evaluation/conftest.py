"""Tokenizers and a tiny run that the tests of generation share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import flags, train

from lit_data.tokenizers.tokenizer import Tokenizer
from lit_data.tokenizers.training import TokenizerSettings, train_tokenizer
from lit_eval.model.eval_model import EvalModel, open_model

TEXT = "Grüße aus Würzburg, 日本 und \N{GRINNING FACE}! Der Hund läuft schnell nach Hause.\n"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One whose tokens may be single bytes, and a sentencepiece model with byte fallback."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    text = (str(folder / "text.txt"),)
    return {
        "bytes": train_tokenizer(TokenizerSettings(text, 270, folder / "bytes")),
        "sentencepiece": train_tokenizer(TokenizerSettings(text, 320, folder / "sp", "sentencepiece")),
    }


@pytest.fixture(scope="session")
def generation_run(data: Path, tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tokenizer, its block of 32 tokens."""
    folder = tmp_path_factory.mktemp("generation") / "run"
    vocab_size = tokenizers["bytes"].vocab_size
    train(*flags(data, folder, model__vocab_size=vocab_size, train__max_steps=2, data__val=None, save__every_steps=2))
    shutil.copytree(tokenizers["bytes"].path.parent, folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def generation_model(generation_run: Path) -> EvalModel:
    return open_model(generation_run, device="cpu")
