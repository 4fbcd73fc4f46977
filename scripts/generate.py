"""Continue a prompt with a run folder's newest checkpoint, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

import torch

from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_eval.model.model_tokenizer import check_own_tokenizer, find_tokenizer, ids_without_token
from lit_eval.model.text_encoding import encode_prompt, encoding_of
from lit_model.generate import generate
from lit_model.load import load_model
from pretrain.cli.command_line import ScriptParser


def parser() -> ScriptParser:
    top = ScriptParser(description=__doc__)
    top.add_argument("--model", type=Path, required=True, help="run folder, checkpoint or Hugging Face folder")
    top.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    prompt = top.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        help="text to continue (empty: the beginning of a document); may be repeated",
    )
    prompt.add_argument(
        "--prompt_ids", action="append", help="token ids to continue, as 5,6; needs no tokenizer; may be repeated"
    )
    top.add_argument("--max_new_tokens", type=int, default=100)
    top.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    top.add_argument("--top_k", type=int)
    top.add_argument("--top_p", type=float)
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--device", default="cpu", help="torch device, for example cuda")
    top.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    return top


def encode_prompts(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[tuple[str | None, list[int]]]:
    """(text, ids) of each prompt; text is None if ids were given."""
    if args.prompt_ids is not None:
        return [(None, parse_ids(ids)) for ids in args.prompt_ids]
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer files: give --tokenizer, or --prompt_ids instead of --prompt")
    encoding = encoding_of(args.model, tokenizer)
    prompts: list[tuple[str | None, list[int]]] = []
    for argument in args.prompt:
        try:  # the raw bytes of the command line, whatever encoding Python assumed
            text = os.fsencode(argument).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--prompt {argument!r} is not UTF-8") from None
        prompts.append((text, encode_prompt(tokenizer, text, encoding)))
    return prompts


def parse_ids(ids: str) -> list[int]:
    try:
        return [int(i) for i in ids.split(",")]
    except ValueError:
        raise ValueError(f"--prompt_ids {ids!r}: give whole numbers separated by commas, as 5,6") from None


def warn_of_another_tokenizer(model: Path, tokenizer: Path) -> None:
    try:
        check_own_tokenizer(model, tokenizer)
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)


def main() -> int:
    args = parser().parse_args()
    try:
        tokenizer_path = args.tokenizer or find_tokenizer(args.model)
        tokenizer = open_tokenizer(tokenizer_path) if tokenizer_path is not None else None
        if args.tokenizer is not None:
            warn_of_another_tokenizer(args.model, args.tokenizer)
        prompts = encode_prompts(args, tokenizer)
        model, config = load_model(args.model)
        model = model.to(args.device)
        excluded = ids_without_token(args.model, tokenizer, config.vocab_size)
        outs = [
            generate(
                model,
                torch.tensor(ids, dtype=torch.int64),
                args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                seed=args.seed,
                eos_id=tokenizer.eos_id if tokenizer is not None else None,
                excluded_ids=excluded,
            ).tolist()
            for _, ids in prompts
        ]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, ((prompt, ids), out) in enumerate(zip(prompts, outs, strict=True)):
        if number and not args.json:
            print()
        show(prompt, ids, out[len(ids) :], tokenizer, args.json)
    return 0


def show(prompt: str | None, ids: list[int], new: list[int], tokenizer: Tokenizer | None, as_json: bool) -> None:
    """Print a prompt and its continuation."""
    stopped = tokenizer is not None and bool(new) and new[-1] == tokenizer.eos_id
    text = tokenizer.decode(new[:-1] if stopped else new) if tokenizer is not None else None
    if as_json:
        print(json.dumps({"prompt": prompt, "prompt_ids": ids, "ids": new, "text": text, "stopped_on_eos": stopped}))
    else:
        print((prompt or "") + text if text is not None else ",".join(map(str, ids + new)))


if __name__ == "__main__":
    sys.exit(main())
