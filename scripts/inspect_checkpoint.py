"""Show the contents of a checkpoint; with --verify, check its checksums (exits with 1 on a mismatch).

python scripts/inspect_checkpoint.py runs/mine              # newest checkpoint of a run
python scripts/inspect_checkpoint.py runs/mine/iter-00001000-ckpt.pth --verify
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_model.cost import count_parameters
from lit_model.load import MODEL_PREFIX, Checkpoint, is_hf_folder, resolve
from pretrain.cli.command_line import ScriptParser


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    meta, config = checkpoint.meta, checkpoint.model_config
    path = checkpoint.path
    layouts = {name: checkpoint.layout(name) for name in checkpoint.names()}
    model = {name: t for name, t in layouts.items() if name.startswith(MODEL_PREFIX)}
    return {
        "path": str(path),
        "kind": "sharded" if checkpoint.sharded else "full",
        "step": meta.get("step"),
        "tokens": meta.get("tokens"),
        "model": config.name or "custom",
        "parameters": count_parameters(config),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in model.values()}),
        "model_bytes": sum(t.nbytes for t in model.values()),
        "optimizer_bytes": sum(t.nbytes for t in layouts.values()) - sum(t.nbytes for t in model.values()),
        "file_bytes": sum(f.stat().st_size for f in (path.iterdir() if checkpoint.sharded else [path])),
        "world_size": meta.get("world_size"),
        "torch": meta.get("torch"),
    }


def print_facts(facts: dict[str, Any]) -> None:
    def shown(key: str) -> str:
        value = facts[key]
        return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    print(f"{facts['path']} ({facts['kind']})")
    print(f"  step {shown('step')}, {shown('tokens')} tokens")
    print(f"  model {facts['model']}: {shown('parameters')} parameters, {', '.join(facts['dtypes'])}")
    print(f"  {shown('file_bytes')} bytes: model {shown('model_bytes')}, optimizer {shown('optimizer_bytes')}")
    print(f"  written by {shown('world_size')} ranks, torch {shown('torch')}")


def faults_of(path: Path) -> list[str]:
    """All faults of a checkpoint; failing to open counts as one."""
    try:
        checkpoint = Checkpoint(path)
        faults = checkpoint.verify()
        if not faults:
            checkpoint.names()
    except ValueError as error:
        return [str(error)]
    return faults


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--verify", action="store_true", help="compare all of it with its checksums, and only this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        path = resolve(args.path)
        if is_hf_folder(path):
            raise ValueError(f"{path} is a Hugging Face folder, no checkpoint")
        if not args.verify:
            facts = facts_of(Checkpoint(path))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.verify:
        if args.json:
            print(json.dumps(facts))
        else:
            print_facts(facts)
        return 0
    faults = faults_of(path)
    if args.json:
        print(json.dumps({"path": str(path), "faults": faults}))
    else:
        print("\n".join([*faults, f"{path}: {f'{len(faults)} faults' if faults else 'no fault'}"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
