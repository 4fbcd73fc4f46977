"""Write what teachers say of a dataset, once for many students: for each token the k likeliest next ones.

    python scripts/cache_teacher.py --teachers runs/a runs/b --data data/train --block_size 128 --k 64 --output cache/

Train with `--objective distillation --distillation.cache cache/ --distillation.divergence topk_kl`. A call that was
killed goes on when it is repeated. Several at once, on one machine or many: `--parts 4`, and `--part 0` to `--part 3`.
The temperature is part of the cache: that of the student's run must be the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

import torch

from lit_data.loading.rows import open_rows
from lit_data.packed.reader import PackedDataset
from lit_model.load import load_tensors, resolve
from pretrain.args import DistillationArgs, TeacherEntry
from pretrain.cli.command_line import ScriptParser
from pretrain.distillation.teacher_cache import CacheFacts, begin_cache, write_cache
from pretrain.distillation.teachers import Teachers, check_teacher, check_tokenizer, identify


def main() -> int:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teachers", type=Path, nargs="+", required=True, help="runs, checkpoints, Hugging Face folders"
    )
    parser.add_argument("--weights", type=float, nargs="+", help="shares of the teachers, relative (all alike)")
    parser.add_argument("--data", type=Path, required=True, help="packed dataset that the student will be trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--block_size", type=int, required=True, help="tokens in a row, as in the student's run")
    parser.add_argument("--k", type=int, required=True, help="tokens to keep of each distribution")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the distillation (2.0)")
    parser.add_argument("--ensemble", choices=["logits", "probabilities"], default="logits", help="what is averaged")
    parser.add_argument("--packing", choices=["concat", "best_fit", "pad"], default="concat", help="as in the run")
    parser.add_argument("--plan_dir", type=Path, help="where the plan of best_fit and pad lies (beside the dataset)")
    parser.add_argument("--no_document_mask", action="store_true", help="documents of a row see each other")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of log-probabilities")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the teachers (bf16 on CUDA, else fp32)")
    parser.add_argument("--batch", type=int, default=16, help="rows at once (16)")
    parser.add_argument("--rows_per_file", type=int, default=4096, help="rows of a file, the unit of going on (4096)")
    parser.add_argument("--part", type=int, default=0, help="number of this call, from 0")
    parser.add_argument("--parts", type=int, default=1, help="calls that share the work")
    parser.add_argument("--allow_tokenizer_mismatch", action="store_true", help="where ids are known to mean the same")
    args = parser.parse_args()
    try:
        if not 0 <= args.part < args.parts:
            raise ValueError(f"--part {args.part} is not in 0..{args.parts - 1} (--parts {args.parts})")
        for name in ("block_size", "k", "batch", "rows_per_file"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
        weights = args.weights or [1.0] * len(args.teachers)
        if len(weights) != len(args.teachers):
            raise ValueError(f"--weights has {len(weights)} numbers for {len(args.teachers)} teachers")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
        entries = [TeacherEntry(resolve(path), weight) for path, weight in zip(args.teachers, weights, strict=True)]
        setting = DistillationArgs(entries, temperature=args.temperature, ensemble=args.ensemble)
        dataset = PackedDataset(args.data)
        vocab_size = load_tensors(entries[0].path)[0].vocab_size
        for entry in entries:
            where = f"--teachers {entry.path}"
            check_teacher(entry.path, vocab_size, args.block_size, where)
            if not args.allow_tokenizer_mismatch:
                check_tokenizer(entry.path, dataset, where, "--allow_tokenizer_mismatch")
        if args.k > vocab_size:
            raise ValueError(f"--k {args.k} exceeds the teachers' vocabulary of {vocab_size}")
        rows = open_rows(dataset, args.packing, args.block_size, args.plan_dir)
        facts = CacheFacts(
            dataset=dataset.fingerprint,
            packing=args.packing,
            block_size=args.block_size,
            document_mask=not args.no_document_mask,
            n_windows=rows.n_windows,
            vocab_size=vocab_size,
            teachers=identify(entries),
            ensemble=args.ensemble,
            temperature=args.temperature,
            precision=precision,
            k=args.k,
            dtype=args.dtype,
            rows_per_file=args.rows_per_file,
        )
        begin_cache(args.output, facts)
        tokens = facts.n_windows * facts.block_size
        print(
            f"{facts.bytes_per_token} bytes a token, {facts.bytes_per_token * tokens / 1e9:.2f} GB in all, "
            f"{facts.n_files} files"
        )
        written, left = write_cache(
            args.output, facts, Teachers(setting, precision, device), rows, args.batch, args.part, args.parts
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    elsewhere = f"; another call is writing {left}" if left else ""
    print(f"{args.output}: {written} files written by part {args.part} of {args.parts}{elsewhere}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
