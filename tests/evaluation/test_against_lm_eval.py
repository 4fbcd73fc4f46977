"""The numbers of lm-evaluation-harness' own Hugging Face backend on exported folders, at batch sizes 1 and 7.

Needs lm-eval 0.4.13 (`pip install lm-eval`), which the default environment lacks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from family_runs import FAMILIES, texts_of, train_family
from running import script

from lit_eval.model.eval_model import EvalModel, open_model
from lit_eval.score.perplexity import perplexity, texts_of_files
from lit_eval.score.task_files import read_task
from lit_eval.score.tasks import run_task

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

TEMPLATES = {
    # BLiMP's, but for where the data is.
    "pairs": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list: [{metric: acc}]
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    # lambada_openai's.
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    # wikitext's.
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path, items: dict[str, Path]) -> None:
    """The harness' task files: `ours_NAME` for each kind."""
    folder.mkdir()
    for name, template in TEMPLATES.items():
        head = f"task: ours_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n"
        (folder / f"{name}.yaml").write_text(f"{head}    test: {items[name]}{template}")


def make_items(texts: list[str], folder: Path) -> dict[str, Path]:
    """Items of each kind from documents; some contexts and documents are several times as long as the block."""
    words = [text.split() for text in texts]
    long = " ".join(texts)[:4000]  # over 800 tokens; the longest block has 256
    records: dict[str, list[dict[str, Any]]] = {
        "pairs": [
            {"sentence_good": " ".join(w[:9]), "sentence_bad": " ".join(words[i - 1][:9])}
            for i, w in enumerate(words[:40])
            if w[:9] != words[i - 1][:9]
        ],
        "choice": [
            {
                "context": (f"{long} " if i % 3 == 0 else "") + " ".join(w[:6]) + ("  " if i % 5 == 0 else ""),
                "choices": [" ".join(w[6:10]), " ".join(words[i - 1][3:6]), " ".join(words[i - 2][:8]) + " ü"],
                "label": 0,
            }
            for i, w in enumerate(words[:30])
            if len(w) > 8
        ],
        "last_word": [
            {"text": (f"{long} " if i % 4 == 0 else "") + " ".join(w[:12])} for i, w in enumerate(words[:40])
        ],
        "documents": [{"text": text} for text in [long, *texts[:20], " ".join(texts)[:1500], "ü", "The cat\n\n  sat "]],
    }
    records["choice"].append({"context": "", "choices": ["The", "A dog"], "label": 1})
    paths = {}
    for name, rows in records.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def by_the_harness(hf: Path, tasks: Path, batch_size: int) -> dict[str, dict[str, float]]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=batch_size)
    assert model.max_length in (128, 256)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names: list[Any] = [f"ours_{name}" for name in TEMPLATES]
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    return {
        name: {key.partition(",")[0]: value for key, value in found["results"][f"ours_{name}"].items()}
        for name in TEMPLATES
    }


def by_us(model: EvalModel, items: dict[str, Path], batch_tokens: int) -> dict[str, dict[str, float]]:
    scorer, encoder = model.scorer(batch_tokens), model.encoder()
    found = {
        name: run_task(read_task(items[name]), scorer, encoder).metrics for name in TEMPLATES if name != "documents"
    }
    texts = texts_of_files([items["documents"]], model.encode)
    return {**found, "documents": perplexity(scorer, texts, encoder.prefix_id).metrics}


def compare(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> None:
    """All numbers that both have, to 1e-4."""
    pairs = ours["pairs"]
    wanted = {
        "pairs": {"acc": pairs["accuracy"] + pairs["ties"]},  # the harness counts a tie as right
        "choice": {name.replace("accuracy", "acc"): value for name, value in ours["choice"].items()},
        "last_word": {"acc": ours["last_word"]["accuracy"], "perplexity": ours["last_word"]["perplexity"]},
        "documents": ours["documents"],
    }
    for name, keys in {
        "pairs": ["acc"],
        "choice": ["acc", "acc_norm", "acc_bytes"],
        "last_word": ["acc", "perplexity"],
        "documents": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    }.items():
        for key in keys:
            print(f"{name} {key}: {wanted[name][key]:.6f} here, {theirs[name][key]:.6f} in the harness")
            assert wanted[name][key] == pytest.approx(theirs[name][key], rel=1e-4), (name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_equal_those_of_the_harness(family: str, tmp_path: Path) -> None:
    run = train_family(family, tmp_path / "run")
    assert script("convert_to_hf.py", "--checkpoint", run, "--output", tmp_path / "hf").returncode == 0
    items = make_items(texts_of(run), tmp_path)
    write_tasks(tmp_path / "tasks", items)
    ours = by_us(open_model(run, device="cpu"), items, 16384)
    for batch_size in (1, 7):
        theirs = by_the_harness(tmp_path / "hf", tmp_path / "tasks", batch_size)
        compare(ours, theirs)
    compare(
        by_us(open_model(tmp_path / "hf", device="cpu"), items, 1),
        by_the_harness(tmp_path / "hf", tmp_path / "tasks", 7),
    )
