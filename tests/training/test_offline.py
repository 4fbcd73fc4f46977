"""All steps from text to a Hugging Face model without a network: in a namespace with only a loopback device.

The system calls show that an available network would not be used either: processes connect only to addresses of their
own machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from lit_files.checkpoint_name import list_checkpoints

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE")
# torch's store looks up each peer's name. /etc/hosts names 127.0.0.1, but a dual-stack socket sees it as the IPv6
# address below, which is looked up at the name server; here the file names it as well.
ENTER = [
    *("unshare", "--map-root-user", "--net", "--mount", "sh", "-c"),
    """hosts=$(mktemp) && { cat /etc/hosts; echo "::ffff:127.0.0.1 localhost"; } >"$hosts" &&
    mount --bind "$hosts" /etc/hosts && rm "$hosts" && ip link set lo up && exec "$@" """,
    "sh",
]
# Addresses of other families are local: AF_UNIX, AF_NETLINK.
INTERNET = re.compile(r'AF_INET6?, .*?inet_(?:addr|pton)\((?:AF_INET6, )?"([^"]+)"')
LOOPBACK = re.compile(r"127\.|::1$|::ffff:127\.")


def can_enter() -> bool:
    try:
        return subprocess.run([*ENTER, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not can_enter(), reason="a network namespace may not be made here (unshare, ip)")


class Offline:
    """Runs commands in `folder` without a network, and collects the addresses they connect to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.traces = 0

    def run(self, *words: object) -> str:
        """Run a command, which must succeed; returns its output."""
        command = [*ENTER, *map(str, words)]
        if shutil.which("strace") is not None:
            # --seccomp-bpf: slows down only these calls.
            trace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o"]
            command = [*ENTER, *trace, str(self.folder / f"trace-{self.traces}"), *map(str, words)]
            self.traces += 1
        environment = {k: v for k, v in os.environ.items() if k not in OFFLINE}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(self.folder / "hf_home"), "PYTHON": sys.executable}
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, script: str, *words: object) -> str:
        return self.run(sys.executable, ROOT / script, *words)

    def addresses(self) -> set[str]:
        """Internet addresses of all commands so far."""
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed (Debian package strace): the commands work, their calls are not seen")
        assert self.traces
        texts = (path.read_text(errors="replace") for path in self.folder.glob("trace-*"))
        return {address for text in texts for address in INTERNET.findall(text)}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """With `run`: its text generated, tokenized and prepared, and trained on by two processes."""
    offline = Offline(tmp_path_factory.mktemp("offline"))
    sizes = ("--train.max_steps=4", "--save.every_steps=4", "--eval.every_steps=4", "--optim.warmup_steps=2")
    offline.python(
        "pretrain/fabric_train.py", "--config", ROOT / "configs/debug.yaml", "--devices=2", "--out_dir=run", *sizes
    )
    return offline


def test_a_connection_would_be_detected(tmp_path: Path) -> None:
    offline = Offline(tmp_path)
    program = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.connect_ex(('192.0.2.1', 53))"
    offline.run(sys.executable, "-c", program)
    assert offline.addresses() == {"192.0.2.1"}


@pytest.mark.slow
def test_training_on_two_processes_and_conversion(offline: Offline) -> None:
    assert list_checkpoints(offline.folder / "run")
    offline.run(ROOT / "scripts/convert_to_hf.sh", "run", "hf")
    assert (offline.folder / "hf" / "model.safetensors").exists()
    assert {a for a in offline.addresses() if not LOOPBACK.match(a)} == set()


@pytest.mark.slow
def test_preparation_training_and_generation(offline: Offline) -> None:
    lines = [json.dumps({"id": str(i), "text": f"Der Absatz {i % 7} von {i}. " * 20}) for i in range(300)]
    (offline.folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    offline.python("scripts/train_tokenizer.py", "--input", "text.jsonl", "--output", "tokenizer", "--vocab_size", 300)
    prepared = ("--tokenizer", "tokenizer", "--output", "data", "--val_fraction", "0.1", "--workers", 2)
    offline.python("scripts/prepare_data.py", "--input", "text.jsonl", *prepared)
    sizes = ("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.intermediate_size=16",
             "--train.block_size=32", "--train.max_steps=4", "--accelerator=cpu", "--devices=1")  # fmt: skip
    paths = ("--data.train=data/train", "--data.val=data/val", "--out_dir=one")
    offline.python("pretrain/fabric_train.py", *sizes, *paths)
    assert offline.python("scripts/generate.py", "--model", "one", "--prompt", "Der", "--max_new_tokens", 5)
    assert {a for a in offline.addresses() if not LOOPBACK.match(a)} == set()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed (extra hf)")
def test_evaluation_against_transformers(offline: Offline) -> None:
    offline.run(ROOT / "scripts/convert_to_hf.sh", "run", "hf-verified")
    printed = offline.python("scripts/verify_hf.py", "--run", "run", "--hf", "hf-verified")
    assert "largest relative difference" in printed
    assert offline.python("scripts/generate.py", "--model", "hf-verified", "--prompt", "a", "--max_new_tokens", 5)
    assert {a for a in offline.addresses() if not LOOPBACK.match(a)} == set()
