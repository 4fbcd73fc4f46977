"""Compiles a model block by block: sets dynamo's recompile limits and counts the blocks that run compiled."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lit_model.kernels.choose import disable_loop_tracing
from lit_model.model import GPT, Block

COMPILATIONS_PER_KIND = 2 * 2 * 2
"""Per kind of block: training and validation, with and without document mask, each first for a static micro-batch and,
once it changes, for dynamic ones. The number of pieces is dynamic from the start."""


def compile_blocks(model: GPT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block; sharding stays outside the graph. Blocks of one kind share their compilations.

    All blocks of all models share one code object, for which dynamo allows 8 compilations; beyond that it falls back to
    eager. The limits are raised as the model requires.
    """
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # sets it for inductor too
    disable_loop_tracing()
    allowed = COMPILATIONS_PER_KIND * len({block.kind() for block in model.blocks()})
    config = torch._dynamo.config
    config.recompile_limit += allowed
    config.accumulated_recompile_limit += allowed
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(other, _LimitReached) for other in logger.filters):
        logger.addFilter(_LimitReached())
    model.register_forward_pre_hook(_free_boundaries, with_kwargs=True)
    for block in model.blocks():
        block.compile(backend=backend)


def _free_boundaries(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Mark the number of pieces as varying: else the second number in a run compiles all blocks a second time."""
    cu_seqlens = kwargs.get("cu_seqlens")
    if cu_seqlens is not None:
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)


class CompiledBlocks:
    """Counts the blocks that run compiled from now on: those whose Python code is never executed.

    Args:
        models: the compiled models by display name.
    """

    def __init__(self, models: dict[str, Sequence[GPT]]) -> None:
        self.blocks = {name: [block for model in some for block in model.blocks()] for name, some in models.items()}
        for block in self._all():
            block.eager_calls = 0
        torch._dynamo.utils.counters["graph_break"].clear()

    def _all(self) -> list[Block]:
        return [block for blocks in self.blocks.values() for block in blocks]

    def counts(self) -> dict[str, tuple[int, int]]:
        """{model: (blocks that run compiled, all blocks)}."""
        return {
            name: (sum(block.eager_calls == 0 for block in blocks), len(blocks)) for name, blocks in self.blocks.items()
        }

    def describe(self) -> str:
        """One-line summary; starts with "warning:" and gives the cause if a block runs eagerly."""
        counts = self.counts()
        parts = [f"{n} of {total} blocks of the {name}" for name, (n, total) in counts.items()]
        line = f"compiled: {', '.join(parts)}"
        if all(n == total for n, total in counts.values()):
            return line
        breaks = [str(reason).strip().splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]]
        cause = breaks[0] if breaks else "dynamo reached a limit or could not trace them, see its warnings"
        return f"warning: {line}; the others run eagerly, and slower ({cause})"


class _LimitReached(logging.Filter):
    """Shortens dynamo's recompile-limit warning to one line, once per function."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(record.args, tuple):
            return True
        limit, value, function, reason, *_ = (*record.args, "", "", "")
        if (limit, function) not in self.seen:
            self.seen.add((limit, function))
            reason = " ".join(str(reason).split())[:300]
            print(
                f"warning: torch.compile stops compiling {function}: its {limit} of {value} is reached. Blocks not "
                f"compiled yet run eagerly, and slower. Last reason for a recompilation: {reason}",
                file=sys.stderr,
                flush=True,
            )
        return False
