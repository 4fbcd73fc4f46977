"""scripts/evaluate.py on a run, its checkpoints and its export: numbers, resuming, mistakes in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate_one import generate
from running import ROOT, flags, script, train, write_dataset

from lit_data.corpus.grammar_nll import conditional_nll
from lit_data.packed.open_dataset import open_dataset
from lit_data.packed.reader import PackedDataset
from lit_eval.evaluation.named_tasks import NAMED_JOBS
from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.evaluator import Evaluator
from lit_eval.model.eval_model import open_model, recorded_checksum
from lit_eval.score.results import read_results
from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import load_model

PAIRS = [{"sentence_good": "The cat sat.", "sentence_bad": "The the sat.", "UID": "a"},
         {"sentence_good": "A dog ran.", "sentence_bad": "Dog a ran.", "UID": "b"}]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on synthetic text, with checkpoints after 2, 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    changes = {"data.synthetic.tokens": 4000, "train.max_steps": 6, "save.every_steps": 2, "save.keep_last": 9,
               "optim.warmup_steps": 2}  # fmt: skip
    settings = [f"--{name}={value}" for name, value in {**changes, "eval.every_steps": 6}.items()]
    train("--config", str(ROOT / "configs" / "debug.yaml"), *settings, "--out_dir", str(folder))
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def evaluate(*arguments: object, status: int = 0, cwd: Path | None = None) -> str:
    """What the script prints: its output, or with another status its errors."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = script("evaluate.py", *arguments, *device, cwd=cwd)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr if status == 0 else done.stderr


def test_validation_data_and_its_text_give_the_same(run: Path, tmp_path: Path) -> None:
    """The run's own validation data by default; its text gives the same bits per byte; both by a formula."""
    newest = list_checkpoints(run)[-1]
    shown = evaluate(run)
    output = run / "evaluation" / "iter-00000006-ckpt.json"
    assert "perplexity" in shown and f"results: {output}" in shown
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    results = read_results(output)
    assert (results.model.step, results.model.tokens) == (6, 6 * 1024)
    assert results.model.checksum == recorded_checksum(newest), "which tells what is done without opening the model"
    packed = results.tasks["perplexity"]

    model, config = load_model(newest)
    dataset = PackedDataset(run / "data" / "packed" / "val")
    nats, n_bytes = 0.0, 0
    texts = [json.loads(line)["text"] for line in (run / "data/text/val.jsonl").read_text().splitlines()]
    for number, text in enumerate(texts):
        start, stop = dataset.document_start(np.asarray([number, number + 1])).tolist()
        ids = torch.from_numpy(np.array([dataset.eos_id, *dataset.tokens(start, stop)[:-1].tolist()]))
        assert len(ids) <= config.block_size
        with torch.no_grad():
            nats -= model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).double().sum().item()
        n_bytes += len(text.encode())
    assert packed.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert packed.n == len(texts) == len(packed.items)

    evaluate(newest, "--data", f"own={run / 'data/text/val.jsonl'}", "--output", tmp_path / "text.json")
    text_result = read_results(tmp_path / "text.json").tasks["perplexity/own"]
    assert text_result.metrics["bits_per_byte"] == pytest.approx(packed.metrics["bits_per_byte"], rel=1e-6)

    plain = tmp_path / "plain.txt"
    plain.write_text("\n<|end|>\n".join(texts))
    evaluate(newest, "--data", plain, "--split_documents", "<|end|>", "--output", tmp_path / "plain.json")
    pieces = read_results(tmp_path / "plain.json").tasks["perplexity/plain"]
    assert pieces.n == len(texts) and pieces.metrics == pytest.approx(text_result.metrics, rel=1e-6)
    fails("<|endd|>: it is on no line of its own", newest, "--data", plain, "--split_documents", "<|endd|>")


def test_synthetic_gives_the_model_over_the_generator(run: Path, tmp_path: Path) -> None:
    evaluate(run, "--tasks", "synthetic", "--output", tmp_path / "s.json")
    metrics = read_results(tmp_path / "s.json").tasks["synthetic"].metrics
    opened = open_model(run, device="cpu")
    nats = floor = 0.0
    for line in (run / "data/text/val.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([*opened.encode([text])[0], opened.need_tokenizer().eos_id])
        with torch.no_grad():
            nats -= opened.model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).double().sum().item()
        floor += conditional_nll(text, opened.need_tokenizer().decode(ids[:1].tolist()), "simple")
    assert metrics["model_over_generator"] == pytest.approx(nats / floor, rel=1e-5)
    assert metrics["generator_nats"] == pytest.approx(floor) and metrics["model_over_generator"] > 1


def test_done_tasks_are_kept_until_something_changes(run: Path, pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    first = evaluate(run, "--tasks", pairs, "german_pairs", "--num_samples", 20, "--output", output)
    assert "done before" not in first
    once = read_results(output).tasks
    assert once["pairs"].n == 2 and once["german_pairs"].n == 20
    assert len(once["german_pairs"].groups["phenomenon"]) > 12, "the items are spread over the phenomena"
    again = evaluate(run, "--tasks", pairs, "synthetic", "--num_samples", 20, "--output", output)
    assert "pairs: done before" in again and set(read_results(output).tasks) == {"pairs", "german_pairs", "synthetic"}
    assert read_results(output).tasks["pairs"] == once["pairs"]
    for changed in (["--num_samples", 20, "--prefix", "bos"], ["--num_samples", 20, "--prefix", "bos", "--overwrite"]):
        assert "done before" not in evaluate(run, "--tasks", pairs, "--output", output, *changed)
    pairs.write_text(json.dumps(PAIRS[1]) + "\n")
    assert "done before" not in evaluate(run, "--tasks", pairs, "--num_samples", 20, "--output", output)
    other = evaluate(list_checkpoints(run)[0], "--tasks", pairs, "--num_samples", 20, "--output", output)
    assert "was of other weights" in other and set(read_results(output).tasks) == {"pairs"}


def test_the_export_gives_the_numbers_of_the_run(run: Path, pairs: Path, tmp_path: Path) -> None:
    assert script("convert_to_hf.py", "--checkpoint", run, "--output", tmp_path / "hf").returncode == 0
    tasks = ["--tasks", pairs, "--data", f"text={run / 'data/text/val.jsonl'}"]
    evaluate(tmp_path / "hf", *tasks, cwd=tmp_path)
    evaluate(run, *tasks, "--output", tmp_path / "run.json")
    ours, theirs = read_results(tmp_path / "run.json").tasks, read_results(tmp_path / "evaluation/hf.json").tasks
    assert set(ours) == set(theirs) == {"pairs", "perplexity/text"}
    for name in ours:
        assert ours[name].metrics == pytest.approx(theirs[name].metrics, rel=1e-5)
    assert "names no validation data" in evaluate(tmp_path / "hf", status=2)


def test_every_checkpoint_but_the_damaged(run: Path, pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    damaged = list_checkpoints(folder)[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    (plain := tmp_path / "plain.txt").write_text("one\ntwo\n")
    text = ("--data", plain, "--split_documents", "blank_line")
    shown = evaluate("--all_checkpoints", folder, "--tasks", pairs, *text)
    assert shown.count("warning: --split_documents blank_line") == 1
    assert f"{folder}: 2 checkpoints evaluated, 1 left out" in shown and f"left out: {damaged}: " in shown
    assert (folder / "evaluation/learning_curves.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (folder / "evaluation").glob("iter-*.json"))
    assert names == ["iter-00000002-ckpt.json", "iter-00000006-ckpt.json"]
    assert evaluate("--all_checkpoints", folder, "--tasks", pairs).count("pairs: done before") == 2
    assert "the checkpoint is damaged" in evaluate(damaged, "--tasks", pairs, status=2)


def test_tasks_in_which_the_model_writes(run: Path, tmp_path: Path) -> None:
    """Prompts and texts come from the run's validation data, and the samples are written out."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\n")
    evaluate(run, "--tasks", "generation", "confidence", "memorization", "--num_samples", 3, "--output",
             tmp_path / "all" / "w.json")  # fmt: skip
    tasks = read_results(tmp_path / "all/w.json").tasks
    texts = [json.loads(line)["text"] for line in (run / "data/text/val.jsonl").read_text().splitlines()]
    written = [sample["prompt"] for sample in tasks["generation"].details["samples"]]
    assert len(written) == 3 and all(any(text.startswith(prompt) for text in texts) for prompt in written)
    samples = (tmp_path / "all/generation_samples.txt").read_text()
    assert samples.count("=== generation, sample") == 3 and f"[{written[0]}]" in samples
    encoded = Evaluator(run, device="cpu").model.encode([texts[i * len(texts) // 3] for i in range(3)])
    assert tasks["confidence"].n == sum(map(len, encoded)) and 0 < tasks["confidence"].metrics["top_1_probability"] < 1
    assert tasks["memorization"].n == 3 and tasks["memorization"].source["data"] == [str(run / "data/packed/train")]
    evaluate(run, "--tasks", "generation", "--custom_prompts", prompts, "--output", tmp_path / "p.json")
    assert [s["prompt"] for s in read_results(tmp_path / "p.json").tasks["generation"].details["samples"]] == [
        "The cat"
    ]


@pytest.mark.parametrize("name", ["generation", "memorization", "confidence"])
def test_what_changes_the_texts_runs_a_task_again(name: str) -> None:
    plain, *changed = (
        EvaluationSettings(),
        EvaluationSettings(text_field="a"),
        EvaluationSettings(split_documents="line"),
    )
    job = NAMED_JOBS[name](name, Path(), plain)
    assert all(job.settings_of(settings) != job.settings_of(plain) for settings in changed)


def fails(message: str, *arguments: object) -> None:
    errors = evaluate(*arguments, status=2)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], errors


def test_mistakes_are_named(run: Path, pairs: Path, data: Path, tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    fails("did you mean german_pairs?", run, "--tasks", "german_pair")
    fails("line 1: the field 'sentence_bad' is missing", run, "--tasks", write("a.jsonl", b'{"sentence_good": "a"}\n'))
    fails("a2.jsonl is empty", run, "--tasks", write("a2.jsonl", b""))
    fails("not UTF-8", run, "--tasks", write("a3.jsonl", b'{"text": "\xff"}\n'))
    fails("no task file", run, "--tasks", tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    fails("holds neither an iter-XXXXXXXX-ckpt.pth nor a config.json", tmp_path / "empty")
    fails("no model at", tmp_path / "nothing")
    half = tmp_path / "iter-00000001-ckpt.pth"
    half.write_bytes(list_checkpoints(run)[0].read_bytes()[:5000])
    fails(f"{half} is not a checkpoint written by this project, or it is damaged", half, "--tasks", pairs)
    fails("is empty", run, "--data", write("b.txt", b""))
    fails("b0.jsonl: the texts hold no token to score", run, "--data", write("b0.jsonl", b'{"text": ""}\n'))
    fails("b2.txt", run, "--data", write("b2.txt", b"ab\xff"))
    fails("does not exist", run, "--data", tmp_path / "missing.txt")
    fails("two entries named b", run, "--data", f"b={pairs}", f"b={run}")
    fails("tokenized for another model", run, "--data", write_dataset(tmp_path / "packed", [9, 9]))
    fails("--device nonsense cannot be used here", run, "--tasks", pairs, "--device", "nonsense")
    fails("--precision fp8: choose one of fp32, bf16, fp16", run, "--tasks", pairs, "--precision", "fp8")
    fails("must end in .json", run, "--output", tmp_path / "x.txt")
    fails("--num_samples 0 must be at least 1", run, "--num_samples", 0)
    fails("holds no checkpoint", "--all_checkpoints", tmp_path / "empty")
    fails("give one MODEL", run, run)
    broken = write("c.json", b"{")
    fails(f"{broken} is damaged", run, "--tasks", pairs, "--output", broken)


def test_without_a_tokenizer(data: Path, pairs: Path, tmp_path: Path) -> None:
    """Packed data can be scored; text cannot, and the message says what to do."""

    train(*flags(data, tmp_path / "run", train__max_steps=1, eval__every_steps=1, optim__warmup_steps=0))
    evaluate(tmp_path / "run")
    result: Any = read_results(tmp_path / "run/evaluation/iter-00000001-ckpt.json").tasks["perplexity"]
    assert result.n == 9 and result.metrics["end_loss"] > 0
    fails("has no tokenizer files", tmp_path / "run", "--tasks", pairs)
    fails("has no tokenizer files", tmp_path / "run", "--data", pairs, "--text_field", "sentence_good")


def test_from_python(run: Path, pairs: Path) -> None:
    """The lines of docs/evaluation.md, against what they stand for."""
    model = Evaluator(run, device="cpu")
    dataset = open_dataset(run / "data" / "packed" / "val")
    texts = [json.loads(line)["text"] for line in (run / "data/text/val.jsonl").read_text().splitlines()]
    assert [document.text for document in dataset] == texts and len(dataset) == len(texts)
    assert dataset[-1].id == dataset[len(texts) - 1].id and dataset[0].tokens.dtype == np.int64
    with pytest.raises(IndexError):
        dataset[len(texts)]
    scored = model.perplexity(texts[:3])
    ids = [dataset[i].tokens[:-1].tolist() for i in range(3)]
    sums = [sum(w.total for w in ws) for ws in model.scorer.score_documents(ids, dataset.dataset.eos_id)]
    assert scored.metrics["nats"] == pytest.approx(-sum(sums), rel=1e-6) and scored.n == len(scored.items) == 3
    as_pairs = [(pair["sentence_good"], pair["sentence_bad"]) for pair in PAIRS]
    assert model.pairs(pairs).items == model.pairs(as_pairs).items == model.task(pairs).items
    with pytest.raises(ValueError, match="are the same"):
        model.pairs([("a", "a")])
    both = model.generate(["The cat", "A"], 8, temperature=0)
    tokenizer = model.model.need_tokenizer()
    prompt = torch.tensor(tokenizer.encode("The cat").tolist())
    new = generate(model.model.model, prompt, 8, temperature=0, eos_id=tokenizer.eos_id)[len(prompt) :].tolist()
    assert both[0] == tokenizer.decode([i for i in new if i != tokenizer.eos_id]) and len(both) == 2
    with pytest.raises(ValueError, match="block_size"):
        model.generate("The cat", 10_000)
