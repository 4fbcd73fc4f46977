"""Serve a model by OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models; and a page to try it at /.

  serve.py --model runs/small
  LLAMMLEIN_API_KEY=... serve.py --model runs/small --host 0.0.0.0

For trying a model and for small tools: requests are answered one after another. docs/serving.md has the commands to
serve an export to many users. Ctrl-C ends it; SIGTERM first lets it finish the answers it has begun.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

from lit_eval.model.choices import Precision
from lit_eval.serving.settings import ServerSettings, check_key
from lit_files.reading import read_text


def main() -> None:
    top = ScriptParser(description=__doc__)
    top.add_argument("--model", type=Path, required=True, help="run folder, checkpoint or Hugging Face folder")
    top.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    top.add_argument("--name", help="of the model in requests and answers (default: its folder's)")
    top.add_argument("--device", help="torch device, for example cuda (default: cuda where there is one, else cpu)")
    top.add_argument("--precision", choices=get_args(Precision), default="fp32", help="default fp32")
    top.add_argument(
        "--api_key_file",
        type=Path,
        metavar="FILE",
        help="holds the API key (or set LLAMMLEIN_API_KEY); else none is asked",
    )
    d = ServerSettings()
    top.add_argument("--host", default=d.host, help="address to listen on; others than the loopback need an API key")
    top.add_argument("--port", type=int, default=d.port, help=f"0: any free one (default {d.port})")
    top.add_argument(
        "--max_new_tokens", type=int, default=d.max_new_tokens, help=f"most of a request (default {d.max_new_tokens})"
    )
    top.add_argument(
        "--max_waiting", type=int, default=d.max_waiting, help=f"requests that may wait (default {d.max_waiting})"
    )
    top.add_argument("--max_body_bytes", type=int, default=d.max_body_bytes, help=f"default {d.max_body_bytes}")
    top.add_argument("--timeout_s", type=float, default=d.timeout_s, help=f"of a request (default {d.timeout_s:g} s)")
    args = top.parse_args()
    settings = ServerSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ServerSettings)})
    key = os.environ.get("LLAMMLEIN_API_KEY")
    if args.api_key_file is not None:
        key = read_text(args.api_key_file).strip()
    check_key(settings, key)
    try:
        import uvicorn

        from lit_eval.serving.app import build_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ValueError("the server needs fastapi and uvicorn: pip install '.[serve]'") from None
    from lit_eval.model.eval_model import open_model

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        server = socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise ValueError(f"--host {settings.host} --port {settings.port}: {reason}; give another") from None
    with server as listening:
        model = open_model(args.model, tokenizer=args.tokenizer, device=args.device, precision=args.precision)
        model.need_tokenizer()
        for warning in model.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        name = args.name or Path(args.model).resolve().name
        config = uvicorn.Config(
            build_app(model, name, settings, key), log_level="warning", server_header=False, timeout_keep_alive=30
        )
        host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
        print(f"serving {name} at http://{host}:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    run_script(main)
