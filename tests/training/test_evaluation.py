"""Tasks and prompts during training: they change nothing, and no evaluation is lost or published twice."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import flags, metrics, ranks_and_folder, same_checkpoints, shared_rank_server, train
from small_models import synthetic_texts, train_small_tokenizer

import pretrain.evaluation
from lit_data.loading.order import Segment
from lit_data.packed.writer import PackedWriter
from lit_data.tokenizers.files import copy_tokenizer
from pretrain.args import EvalArgs
from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.evaluation_plan import cut_evaluations, is_due
from pretrain.loop import fit

STEPS = 8


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train and DIR/val with a tokenizer, pairs.jsonl and prompts.txt."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = train_small_tokenizer(folder / "tokenizer")
    for name, seed, n in (("train", 0, 150), ("val", 1, 10)):
        out = folder / name
        facts = {**tokenizer.facts(), "folder": "tokenizer"}
        sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "shard_tokens": 10**6}
        with PackedWriter(out, tokenizer=facts, **sizes) as writer:
            for i, text in enumerate(synthetic_texts(n, seed)):
                ids = np.append(tokenizer.encode(text), tokenizer.eos_id)
                n_bytes, n_words = len(text.encode()), len(text.split())
                writer.add(ids, id=f"doc-{i}", source="synthetic", place=i, n_bytes=n_bytes, n_words=n_words)
        copy_tokenizer(folder / "tokenizer", out / "tokenizer")
    some = [text[:24] for text in synthetic_texts(12, 2)]
    pairs = [{"sentence_good": text, "sentence_bad": text[::-1]} for text in some]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "prompts.txt").write_text("the\nin the morning\n")
    return folder


def evaluated(texts: Path, out: Path, **changes: object) -> list[str]:
    """A run that evaluates after every second step, in batches of a few pairs."""
    settings: dict[str, object] = {
        "train__max_steps": STEPS,
        "model__vocab_size": None,
        "eval__tasks": json.dumps([str(texts / "pairs.jsonl")]),
        "eval__prompts": texts / "prompts.txt",
        "eval__tasks_every_steps": 2,
        "eval__sample_tokens": 5,
        "eval__micro_batch_samples": 1,
    }
    return flags(texts, out, **{**settings, **changes})


PLAIN = {"eval__tasks": None, "eval__prompts": None}


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def numbers(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without those of the clock."""
    clock = ("seconds", "tokens_per_s", "mfu", "memory", "time")
    return [{k: v for k, v in row.items() if not any(name in k for name in clock)} for row in metrics(run)]


@pytest.mark.parametrize(
    "placement",
    [
        {"devices": 1},
        pytest.param({"devices": 2}, marks=pytest.mark.slow),
        pytest.param({"devices": 2, "strategy": "fsdp"}, marks=pytest.mark.slow),
    ],
    ids=["one", "ddp", "fsdp"],
)
def test_evaluating_changes_nothing(texts: Path, tmp_path: Path, placement: dict[str, object]) -> None:
    train(*evaluated(texts, tmp_path / "with", **placement))
    train(*evaluated(texts, tmp_path / "without", **placement, **PLAIN))
    for name in ("iter-00000004-ckpt.pth", "iter-00000008-ckpt.pth"):
        same_checkpoints(tmp_path / "with" / name, tmp_path / "without" / name)
    columns = ("step", "train_loss", "val_loss", "grad_norm", "tokens")
    one, two = ([[row[c] for c in columns] for row in metrics(tmp_path / run)] for run in ("with", "without"))
    assert one == two
    assert [row["step"] for row in metrics(tmp_path / "with") if row["eval/pairs"]] == ["0", "2", "4", "6", "8"]
    found = lines(tmp_path / "with")
    assert [line["step"] for line in found if "task" in line] == [0, 2, 4, 6, 8]
    assert [line["prompt"] for line in found if "prompt" in line] == ["the", "in the morning"] * 5


def test_ranks_agree_with_one_process(texts: Path, tmp_path: Path) -> None:
    """The model at step 0 is the same, and so are its scores and its samples."""
    for devices in (1, 2):
        train(*evaluated(texts, tmp_path / str(devices), devices=devices, train__max_steps=2))
    one, two = ([line for line in lines(tmp_path / name) if line["step"] == 0] for name in ("1", "2"))
    assert one[1:] == two[1:]
    assert one[0]["metrics"] == pytest.approx(two[0]["metrics"], rel=1e-5)


@pytest.mark.parametrize("entry", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_in_an_evaluation_it_resumes_bit_for_bit(texts: Path, tmp_path: Path, entry: int) -> None:
    train(*evaluated(texts, tmp_path / "whole"))
    arguments = evaluated(texts, tmp_path / "killed")
    moment = {"rank": 0, "phase": "evaluation", "entry": entry, "delay_s": 0.01, "everyone": True}
    answer = shared_rank_server().run(*ranks_and_folder(arguments), arguments, watch=True, moment=moment)
    assert answer.killed and set(answer.statuses) == {-signal.SIGKILL}, answer.output
    train(*arguments, "--resume=auto")
    last = "iter-00000008-ckpt.pth"
    same_checkpoints(tmp_path / "whole" / last, tmp_path / "killed" / last)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "killed")
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_the_last_evaluation_is_made_up_for_and_then_the_run_is_finished(texts: Path, tmp_path: Path) -> None:
    arguments = evaluated(texts, tmp_path, eval__tasks_every_steps=STEPS)
    moment = {"rank": 0, "phase": "evaluation", "entry": 2, "delay_s": 0.01, "everyone": True}
    shared_rank_server().run(*ranks_and_folder(arguments), arguments, watch=True, moment=moment)
    assert (tmp_path / "iter-00000008-ckpt.pth").exists()
    assert metrics(tmp_path)[-1]["step"] == str(STEPS - 1)
    train(*arguments, "--resume=auto")
    assert metrics(tmp_path)[-1]["step"] == str(STEPS) and metrics(tmp_path)[-1]["eval/pairs"]
    before = lines(tmp_path)
    assert "is finished" in train(*arguments, "--resume=auto").stdout
    assert lines(tmp_path) == before


def test_a_failing_evaluation_costs_a_warning(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(pretrain.evaluation, "score_targets", broken)
    run = set_up(parse(evaluated(texts, tmp_path, train__max_steps=2)))
    assert fit(run) is None
    run.close()
    output = capsys.readouterr().out
    assert "step 2: the evaluation pairs failed and is left out: RuntimeError: no memory" in output
    assert [row["eval/pairs"] for row in metrics(tmp_path)] == ["", "", ""]
    assert [line["step"] for line in lines(tmp_path)] == [0, 0, 2, 2]  # the prompts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__tasks": '["pears"]'}, "--eval.tasks: there is no task or file 'pears'"),
        ({"eval__prompts": "DIR/empty.txt"}, "empty.txt holds no prompt"),
        ({"eval__prompts": "DIR/long.txt"}, "a prompt of 80 tokens leaves no room in the context of 32 tokens"),
        ({"eval__tasks": '["DIR/long.jsonl"]'}, "long.jsonl: no item fits the model's context of 32 tokens"),
        ({"eval__tasks_every_steps": 0}, "--eval.tasks_every_steps 0 must be at least 1"),
        ({"eval__tasks_every_tokens": 100}, "mutually exclusive"),
    ],
)
def test_mistakes_are_named_before_the_first_step(
    texts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("qx" * 40)
    (tmp_path / "long.jsonl").write_text(json.dumps({"sentence_good": "qx" * 40, "sentence_bad": "qz" * 40}) + "\n")
    changes = {name: v.replace("DIR", str(tmp_path)) if isinstance(v, str) else v for name, v in changes.items()}
    done = train(*evaluated(texts, tmp_path / "run", **changes), check=False)
    assert done.returncode == 2 and message in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


def test_data_without_a_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    done = train(*flags(data, tmp_path / "run", eval__tasks='["german_pairs"]'), check=False)
    assert done.returncode == 2 and "need a tokenizer" in done.stdout, done.stdout


def test_damaged_lines_are_dropped_and_stop_no_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evaluations.jsonl"
    good = [json.dumps({"step": step, "task": "ü"}, ensure_ascii=False).encode() + b"\n" for step in (0, 2, 4, 6)]
    damaged = [b"\xff\x00\n", b"[1]\n", b'{"step": "2"}\n', b"{}\n", b"[" * 100_000 + b"\n"]
    path.write_bytes(b"".join([good[0], *damaged, *good[1:]]) + b'{"step": 2')
    cut_evaluations(path, 4, again=False)
    assert path.read_bytes() == b"".join(good[:3])
    cut_evaluations(path, 4, again=True)
    assert path.read_bytes() == b"".join(good[:2])
    assert capsys.readouterr().err == ""
    path.unlink()
    path.mkdir()
    cut_evaluations(path, 4, again=False)
    assert f"warning: {path} could not be cut back to step 4" in capsys.readouterr().err


def test_by_words(texts: Path, tmp_path: Path) -> None:
    """After the first step at or past each multiple."""
    train(*evaluated(texts, tmp_path, eval__tasks_every_steps=None, eval__tasks_every_words=200, eval__prompts=None))
    rows = [row for row in metrics(tmp_path) if row["words"]]
    words = [int(row["words"]) for row in rows]
    due = [i for i in range(1, len(rows)) if words[i] // 200 > words[i - 1] // 200]
    assert len(rows) == STEPS + 1 and 1 < len(due) < STEPS
    assert [i for i, row in enumerate(rows) if row["eval/pairs"]] == sorted({0, *due, STEPS})


def test_by_words_of_data_without_them_is_refused(data: Path, tmp_path: Path) -> None:
    done = train(*flags(data, tmp_path / "run", eval__tasks_every_words=100), check=False)
    assert done.returncode == 2 and "--eval.tasks_every_words: " in done.stdout and "count_words.py" in done.stdout


def test_when_it_is_due() -> None:
    segments = [Segment(0, 0, 8)]

    def steps(**settings: Any) -> list[int]:
        return [s for s in range(13) if is_due(EvalArgs(**settings), segments, 32, s, 12)]

    assert steps(every_steps=5) == [0, 5, 10, 12]
    assert steps(every_steps=5, tasks_every_steps=4) == [0, 4, 8, 12]
    assert steps(tasks_every_tokens=1000) == [0, 4, 8, 12]  # 256 tokens a step
