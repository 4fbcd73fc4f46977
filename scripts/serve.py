"""Serve a model through an OpenAI-compatible API (/v1/completions, /v1/chat/completions, /v1/models), with a web page
to try it at /.

    python scripts/serve.py --model runs/small
    LLAMMLEIN_API_KEY=... python scripts/serve.py --model runs/small --host 0.0.0.0

For trying a model and for small tools: requests run one at a time. docs/serving.md describes how to serve an exported
model to many users. On Ctrl-C and SIGTERM, running requests are finished first; a second Ctrl-C exits at once.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from lit_eval.model.choices import Precision
from lit_eval.serving.settings import ServerSettings, check_key
from lit_files.reading import read_text


def main() -> None:
    top = ScriptParser(description=__doc__)
    top.add_argument("--model", type=Path, required=True, help="run folder, checkpoint or Hugging Face folder")
    top.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    top.add_argument("--name", help="model name in requests and responses (default: the folder's name)")
    top.add_argument("--device", help="torch device, for example cuda (default: cuda if available, else cpu)")
    top.add_argument("--precision", choices=get_args(Precision), default="fp32", help="default fp32")
    top.add_argument(
        "--api_key_file", type=Path, metavar="FILE", help="file with the API key (default: $LLAMMLEIN_API_KEY, if set)"
    )
    top.add_fields(ServerSettings, {"host": "address and limits"})
    args = top.parse_args()
    settings = ServerSettings(**given_fields(ServerSettings, args))
    key = os.environ.get("LLAMMLEIN_API_KEY")
    if args.api_key_file is not None:
        key = read_text(args.api_key_file).strip()
    check_key(settings, key)
    try:
        from lit_eval.serving.app import build_app, http_server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "jinja2"):
            raise
        raise ValueError(f"the server needs the package {error.name}: pip install 'llammlein[serve]'") from None
    from lit_eval.model.eval_model import open_model

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise ValueError(
            f"--host {settings.host} --port {settings.port}: {reason}; choose another address or port"
        ) from None
    with listening:
        model = open_model(args.model, tokenizer=args.tokenizer, device=args.device, precision=args.precision)
        model.need_tokenizer()
        for warning in model.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        name = args.name or Path(args.model).resolve().name
        server = http_server(build_app(model, name, settings, key), settings)
        host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
        print(f"serving {name} at http://{host}:{listening.getsockname()[1]} (stop with Ctrl-C)", flush=True)
        server.run(sockets=[listening])


if __name__ == "__main__":
    run_script(main, "interrupted")
