"""Choices of opening a model and reading text, for command lines. Standard library only."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
Prefix = Literal["auto", "bos", "eos", "none"]
