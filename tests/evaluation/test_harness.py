"""lm-evaluation-harness on our model, against its own Hugging Face backend on the same folder, on local data.

Needs lm-eval (`pip install -e '.[eval]'`) and transformers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from small_models import synthetic_texts, train_small_tokenizer, write_model_folder

from lit_data.tokenizers.tokenizer import Tokenizer
from lit_eval.model.eval_model import open_model
from lit_eval.score.harness import data_files, harness_model, run_harness, task_manager

pytestmark = pytest.mark.slow

KINDS = [("llama", False, 1), ("llama", True, 5000), ("gpt2", False, 300), ("gemma2", True, 300)]


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local data of tasks of each kind: pairs, multiple choice, rolling perplexity, generation."""
    folder = tmp_path_factory.mktemp("lm_eval_data")
    texts = synthetic_texts(30, seed=1)
    words = " ".join(texts).split()
    rows: dict[str, list[dict[str, Any]]] = {
        "multiblimp_deu": [{"sen": text[:60], "wrong_sen": text[:50] + " " + words[i]} for i, text in enumerate(texts)],
        "arc_challenge_mt_de": [
            {
                "question": text[:40],
                "choices": {"text": words[4 * i : 4 * i + 4], "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4],
            }
            for i, text in enumerate(texts)
        ],
        "belebele_deu_Latn": [
            {
                "flores_passage": text,
                "question": text[-30:],
                **{f"mc_answer{k}": words[4 * i + k] for k in range(1, 5)},
                "correct_answer_num": str(i % 4 + 1),
            }
            for i, text in enumerate(texts)
        ],
        "wikitext": [{"page": " ".join(texts[i : i + 3])} for i in range(0, 30, 3)],
    }
    for name, items in rows.items():
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def theirs(folder: Path, name: str, data: Path) -> dict[str, float]:
    """The same task by the harness' own backend."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    manager = task_manager()
    overrides = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in data_files(data, name).items()}},
    }
    task = manager._factory.build(manager.task_index[name], overrides=overrides, registry=manager._index)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
    found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return {key.removesuffix(",none"): value for key, value in found["results"][name].items() if "," in key}


@pytest.mark.parametrize(("family", "bos", "batch_tokens"), KINDS)
def test_every_kind_of_task_equals_the_harness(
    family: str, bos: bool, batch_tokens: int, small_tokenizer: Tokenizer, data_folder: Path, tmp_path: Path
) -> None:
    """Contexts of belebele and wikitext are longer than the block."""
    pytest.importorskip("lm_eval")
    folder = write_model_folder(tmp_path / "model", small_tokenizer, family, bos=bos)
    model = open_model(folder, device="cpu")
    for name in ("multiblimp_deu", "arc_challenge_mt_de", "belebele_deu_Latn", "wikitext"):
        ours = run_harness(model, name, data=data_folder, batch_tokens=batch_tokens)
        expected = theirs(folder, name, data_folder)
        for metric, value in expected.items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours.metrics[metric] == pytest.approx(value, rel=1e-4), (name, metric)


def test_generation_equals_the_harness(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = write_model_folder(tmp_path / "model", small_tokenizer)
    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    native = harness_model(open_model(folder, device="cpu"))
    settings = [{"until": ["."], "max_gen_toks": 12}, {"until": ["a"], "max_gen_toks": 20}, {"max_gen_toks": 5}]
    requests = [
        Instance("generate_until", {}, (text[:n], dict(setting)), i)
        for i, (text, n) in enumerate(zip(synthetic_texts(6, seed=2), (1, 5, 20, 40, 90, 300), strict=True))
        for setting in settings
    ]
    assert native.generate_until(requests) == hf.generate_until(requests)


def test_unknown_tasks_and_missing_data_are_named(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = open_model(write_model_folder(tmp_path / "model", small_tokenizer), device="cpu")
    with pytest.raises(ValueError, match=r"no task belebel_deu_Latn; did you mean belebele_deu_Latn"):
        run_harness(model, "belebel_deu_Latn")
    with pytest.raises(ValueError, match=r"has no data for multiblimp_deu: multiblimp_deu\.jsonl"):
        run_harness(model, "multiblimp_de", data=tmp_path)
