"""Continue prompts with a run folder's newest checkpoint, a checkpoint, or a Hugging Face folder.

    python scripts/generate.py --model runs/small --prompt "Es war einmal" --num_samples 3
    python scripts/generate.py --model runs/small --prompts prompts.txt --json
    python scripts/generate.py --model runs/small                          # a session: type a prompt, read what follows

In a session Ctrl-C ends a continuation and Ctrl-D the session.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

from lit_eval.generation.prompts import read_prompts
from lit_eval.generation.settings import GenerationSettings
from lit_eval.model.choices import Precision
from lit_model.sampling import Sampling


def parser() -> ScriptParser:
    top = ScriptParser(description=__doc__)
    top.add_argument("--model", type=Path, required=True, help="run folder, checkpoint or Hugging Face folder")
    top.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    prompt = top.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        action="append",
        help="text to continue (empty: the beginning of a document); may be repeated",
    )
    prompt.add_argument(
        "--prompt_ids", action="append", help="token ids to continue, as 5,6; needs no tokenizer; may be repeated"
    )
    prompt.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a .txt with a prompt a line, or a .jsonl with the field "prompt"'
    )
    top.add_argument("--max_new_tokens", type=int, default=100, help="default 100")
    top.add_argument("--num_samples", type=int, default=1, help="texts for each prompt (default 1)")
    top.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token (default 0.8)")
    top.add_argument("--top_k", type=int, help="sample from this many of the most probable tokens")
    top.add_argument("--top_p", type=float, help="sample from the most probable tokens with this total probability")
    top.add_argument(
        "--min_p", type=float, help="sample from tokens with at least this fraction of the largest probability"
    )
    top.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: fewer repetitions (default 1: off)"
    )
    top.add_argument("--stop", action="append", default=[], help="end a text before this string; may be repeated")
    top.add_argument(
        "--seed", type=int, default=0, help="of a prompt's first sample; the next has the next (default 0)"
    )
    top.add_argument("--batch_size", type=int, default=8, help="texts generated at once (default 8)")
    top.add_argument("--device", help="torch device, for example cuda (default: cuda where there is one, else cpu)")
    top.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="of the computation (default fp32)"
    )
    top.add_argument("--json", action="store_true", help="print one JSON object a text")
    return top


def settings_of(args: argparse.Namespace) -> GenerationSettings:
    return GenerationSettings(
        Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p),
        args.max_new_tokens,
        args.num_samples,
        args.seed,
        tuple(args.stop),
        args.batch_size,
    )


def given_prompts(args: argparse.Namespace) -> list[str | list[int]] | None:
    """The prompts of the command line; None: none was given."""
    if args.prompt_ids is not None:
        return [parse_ids(ids) for ids in args.prompt_ids]
    if args.prompts is not None:
        return list(read_prompts(args.prompts))
    if args.prompt is None:
        return None
    prompts: list[str | list[int]] = []
    for argument in args.prompt:
        try:  # the raw bytes of the command line, whatever encoding Python assumed
            prompts.append(os.fsencode(argument).decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"--prompt {argument!r} is not UTF-8") from None
    return prompts


def parse_ids(ids: str) -> list[int]:
    try:
        return [int(i) for i in ids.split(",")]
    except ValueError:
        raise ValueError(f"--prompt_ids {ids!r}: give whole numbers separated by commas, as 5,6") from None


def main() -> None:
    args = parser().parse_args()
    settings = settings_of(args)
    prompts = given_prompts(args)
    if prompts is None and not sys.stdin.isatty():
        raise ValueError("give --prompt, --prompt_ids or --prompts, or call it in a terminal for a session")
    from lit_eval.generation.session import run_session, show
    from lit_eval.generation.text import encode_prompts, generate_texts
    from lit_eval.model.eval_model import open_model

    model = open_model(args.model, tokenizer=args.tokenizer, device=args.device, precision=args.precision)
    for warning in model.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if prompts is None:
        model.need_tokenizer()
        encode_prompts(model, [""], settings.max_new_tokens)  # settings that fit no prompt end it here
        run_session(model, settings, args.json)
    else:
        show(generate_texts(model, prompts, settings), args.json)


if __name__ == "__main__":
    run_script(main, "interrupted")
