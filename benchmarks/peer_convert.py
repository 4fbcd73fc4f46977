"""Time and memory of one conversion in a fresh process; started by `convert.py`.

    python peer_convert.py litgpt PLAN      # needs torch and litgpt only, so that it runs in litgpt's own environment

The plan is a JSON file: `source` and `output` as the converter expects them; for litgpt also the model's `config`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(convert: Callable[[], object]) -> None:
    """Convert; print seconds, of the clock and of a CPU, and bytes of memory: after the imports, and the peak above."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    imports = _status("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    convert()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    memory = {"import_bytes": imports, "above_bytes": _status("VmHWM") - imports}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, **memory}))


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes. Resident: of the process's own memory and of files it has mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{field} is not in /proc/self/status")


def litgpt(plan: dict[str, Any]) -> Callable[[], object]:
    """litgpt's converter to Hugging Face's names, on a folder with lit_model.pth."""
    from litgpt import Config
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
    from litgpt.utils import save_config

    source, c = Path(plan["source"]), plan["config"]
    taken = ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size", "block_size", "padded_vocab_size")
    config = Config(
        name="llama",
        **{key: c[key] for key in taken},
        vocab_size=c["padded_vocab_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    save_config(config, source)
    return lambda: convert_lit_checkpoint(source, Path(plan["output"]))


if __name__ == "__main__":
    name, plan_file = sys.argv[1:]
    assert name == "litgpt", name
    measure(litgpt(json.loads(Path(plan_file).read_text())))
