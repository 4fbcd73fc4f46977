"""Texts from prompts: decoding token by token, stop strings, the script and its errors."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples
from running import ROOT, script, script_error

from lit_data.tokenizers.tokenizer import Tokenizer
from lit_eval.generation.prompts import read_prompts
from lit_eval.generation.session import run_session
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import TextStream, generate_texts, stream_text, text_of
from lit_eval.model.eval_model import EvalModel
from lit_model.sampling import Sampling

TEXT = "Grüße aus Würzburg, 日本 und \N{GRINNING FACE}! Der Hund läuft schnell nach Hause."


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokens_become_text_one_by_one(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Cut anywhere between prompt and continuation, the pieces are the text behind the prompt's: no space and no byte
    is lost, and no half character is ever shown."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(TEXT + " Zürich \N{OCTOPUS}").tolist()
    whole = tokenizer.decode(ids)
    assert any(tokenizer.decode([id]).endswith("\ufffd") for id in ids)
    for cut in range(1, len(ids)):
        stream = TextStream(tokenizer, ids[:cut])
        pieces = [stream.add(id) for id in ids[cut:]]
        assert not any("\ufffd" in piece for piece in pieces)
        before = tokenizer.decode(ids[:cut])
        while not whole.startswith(before):  # the prompt ends inside a character
            before = before[:-1]
        assert before + "".join(pieces) + stream.finish() == whole
    # Bytes that become no character are shown in the end.
    byte = next(id for id in ids if tokenizer.decode([id]) == "\ufffd")
    stream = TextStream(tokenizer, ids[:2])
    assert stream.add(byte) == "" and stream.finish() == "\ufffd"


@examples(60)
@given(
    ids=st.lists(st.integers(0, 289), max_size=20),
    cut=st.integers(0, 5),
    stop=st.lists(st.sampled_from(["Hund", " l", "Würz", "e", "us W", "!"]), max_size=2),
)
def test_a_stop_string_ends_the_text(
    ids: list[int], cut: int, stop: list[str], tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers["sentencepiece"]
    free = text_of(tokenizer, ids[:cut], ids[cut:])
    wanted = free[: min((free.find(s) for s in stop if s in free), default=len(free))]
    assert text_of(tokenizer, ids[:cut], ids[cut:], stop) == wanted
    stream = TextStream(tokenizer, ids[:cut], stop)
    shown = ""
    for id in ids[cut:]:
        shown += stream.add(id)
        assert wanted.startswith(shown)


@pytest.fixture
def run(generation_run: Path) -> Path:
    return generation_run


@pytest.fixture
def model(generation_model: EvalModel) -> EvalModel:
    return generation_model


SETTINGS = GenerationSettings(Sampling(temperature=1.0, top_p=0.9), max_new_tokens=12, num_samples=3, seed=5)


def test_samples_have_their_own_seeds(model: EvalModel) -> None:
    texts = generate_texts(model, ["Grüße", [5, 6, 7], ""], SETTINGS)
    assert [(one.prompt, one.sample) for one in texts[::3]] == [("Grüße", 0), (None, 0), ("", 0)]
    assert [one.sample for one in texts] == [0, 1, 2] * 3
    assert texts[3].prompt_ids == [5, 6, 7] and texts[6].prompt_ids == [model.need_tokenizer().eos_id]
    for one in texts:
        alone = GenerationSettings(SETTINGS.sampling, 12, seed=5 + one.sample)
        again = generate_texts(model, [one.prompt if one.prompt is not None else one.prompt_ids], alone)[0]
        assert (again.ids, again.text, again.finish) == (one.ids, one.text, one.finish)
        if one.prompt is not None:
            assert "".join(stream_text(model, one.prompt, alone)) == one.text
    assert len({tuple(one.ids) for one in texts[:3]}) == 3


def test_stop_strings_end_generation(model: EvalModel) -> None:
    free = generate_texts(model, ["Grüße", "aus"], SETTINGS)
    stop = free[4].text[3:5]  # type: ignore[index]
    stopped = generate_texts(model, ["Grüße", "aus"], GenerationSettings(SETTINGS.sampling, 12, 3, 5, (stop,), 4))
    for one, whole in zip(stopped, free, strict=True):
        assert whole.text is not None and one.text == whole.text.partition(stop)[0]
        if stop in whole.text:
            assert one.finish == "stop" and one.ids == whole.ids[: len(one.ids)]
    assert any(one.finish == "stop" and len(one.ids) < 12 for one in stopped)


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße \r\n\n  aus\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["Grüße ", "  aus"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x\\ny", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["x\ny", ""]


def test_the_script(run: Path, model: EvalModel, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Grüße\naus\n", encoding="utf-8")
    line = ("--model", run, "--prompts", tmp_path / "p.txt", "--num_samples", 3, "--seed", 5, "--max_new_tokens", 12)
    done = script("generate.py", *line, "--temperature", 1.0, "--top_p", 0.9, "--batch_size", 2, "--json")
    assert done.returncode == 0, done.stderr
    ours = generate_texts(model, ["Grüße", "aus"], SETTINGS)
    for printed, one in zip(map(json.loads, done.stdout.splitlines()), ours, strict=True):
        assert printed["ids"] == one.ids and printed["text"] == one.text and printed["finish"] == one.finish
        assert printed["stopped_on_eos"] == (one.finish == "eos") and printed["sample"] == one.sample


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "latin.txt").write_bytes(b"ab\xff")
    (tmp_path / "folder").mkdir()
    broken = tmp_path / "iter-00000002-ckpt.pth"
    broken.write_bytes((run / "iter-00000002-ckpt.pth").read_bytes()[:2000])
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    cases = [
        ((run, "--prompts", tmp_path / "empty.txt"), "empty.txt holds no prompt"),
        ((run, "--prompts", tmp_path / "bad.jsonl"), "bad.jsonl, line 2: expected a JSON object with a string in"),
        ((run, "--prompts", tmp_path / "latin.txt"), "latin.txt: not valid UTF-8"),
        ((run, "--prompts", tmp_path / "no.txt"), "no file of prompts at"),
        ((run, "--prompts", tmp_path / "a.csv"), "give a .txt with a prompt a line, or a .jsonl"),
        ((run, "--prompt", "Grüße " * 30), "exceed the model's context (block_size 32)"),
        ((run, "--prompt", "a", "--prompt", "b" * 99), "prompt 2: its 99 tokens"),
        ((run, "--prompt", "a", "--top_p", 2), "top_p is 2.0"),
        ((run, "--prompt", "a", "--num_samples", 0), "num_samples is 0"),
        ((run, "--prompt", "a", "--device", "abc"), "--device abc"),
        ((run,), "give --prompt, --prompt_ids or --prompts"),
        ((tmp_path / "bare", "--prompt", "a"), "no tokenizer"),
        ((broken, "--prompt_ids", "5"), broken.name),
        ((tmp_path / "folder", "--prompt_ids", "5"), "holds neither an iter-XXXXXXXX-ckpt.pth nor a config.json"),
        ((tmp_path / "nothing", "--prompt_ids", "5"), "no model at"),
    ]
    for arguments, message in cases:
        assert message in script_error("generate.py", "--max_new_tokens", 8, "--model", *arguments), arguments


class Terminal:
    """The script in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.fd, inner = pty.openpty()
        line = [sys.executable, str(ROOT / "scripts" / "generate.py"), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            line,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(inner)

    def read_until(self, end: str, timeout_s: float = 60) -> str:
        seen = b""
        deadline = time.monotonic() + timeout_s
        while not seen.decode("utf-8", "replace").replace("\r\n", "\n").endswith(end):
            assert select.select([self.fd], [], [], deadline - time.monotonic())[0], seen
            try:
                seen += os.read(self.fd, 1000)
            except OSError:  # how Linux says that the other end is closed
                break
        return seen.decode("utf-8").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        time.sleep(0.5)  # the prompt is on the screen before the terminal is ready for keys
        os.write(self.fd, text.encode())


@pytest.mark.slow
def test_a_session_in_a_terminal(run: Path, model: EvalModel) -> None:
    terminal = Terminal("--model", run, "--max_new_tokens", 20, "--temperature", 0)
    try:
        assert "Ctrl-D the session" in terminal.read_until("> ")
        (text,) = generate_texts(model, ["Grüße"], GenerationSettings(Sampling(temperature=0), 20))
        terminal.type("Grüße\n")
        assert terminal.read_until("> ").endswith(f"Grüße{text.text}\n> ".replace("\r\n", "\n"))
        terminal.type("x" * 40 + "\n")  # an error does not end the session
        assert "error: the prompt: its 40 tokens" in terminal.read_until("> ")
        terminal.type("\x03")  # nor does Ctrl-C at the prompt
        terminal.read_until("> ")
        terminal.type("\x04")
        terminal.read_until("the end")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def test_ctrl_c_ends_a_continuation_only(model: EvalModel, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The session of the script, with keys and interrupts played."""
    keys = iter(["Grüße", KeyboardInterrupt, "aus", EOFError])

    def typed(_: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    calls = []
    forward = model.model.forward

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*arguments, **named)

    monkeypatch.setattr(model.model, "forward", interrupted)
    greedy = GenerationSettings(Sampling(temperature=0), 12)
    run_session(model, greedy, False)
    monkeypatch.undo()
    out = capsys.readouterr().out
    first, second = (one.text for one in generate_texts(model, ["Grüße", "aus"], greedy))
    lines = out.split("aus" + str(second))
    assert len(lines) == 2 and lines[0].startswith("Grüße") and not lines[0].startswith("Grüße" + str(first))
    assert "Grüße" + str(first)[:1] in out or not str(first)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
