"""The processes that a launcher (srun, torchrun) has started, as its variables describe them."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process is rank 0, as far as the environment says, or starts the others itself."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
