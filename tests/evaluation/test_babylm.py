"""BabyLM's tasks against the pipeline's formulas in float64, on items of each format that the tests write."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import synthetic_texts, train_small_tokenizer, write_model_folder

from lit_data.tokenizers.tokenizer import JsonTokenizer, Tokenizer
from lit_eval.evaluation import babylm_tasks
from lit_eval.evaluation.babylm_tasks import name_and_revisions
from lit_eval.evaluation.evaluate import evaluate
from lit_eval.evaluation.named_tasks import check_given
from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.model.eval_model import EvalModel, open_model
from lit_eval.score.babylm import run_babylm, spearman, write_predictions
from lit_eval.score.babylm_data import BabylmTask, read_babylm
from lit_eval.score.reading_times import regress
from lit_eval.score.results import read_results
from lit_files.checkpoint_name import list_checkpoints

MEASUREMENTS = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound", "self_paced_reading_time")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_small_tokenizer(tmp_path_factory.mktemp("babylm") / "bpe")


@pytest.fixture(scope="module", params=[("llama", True), ("gpt2", False)], ids=["bos", "no_bos"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> EvalModel:
    family, bos = request.param
    return open_model(
        write_model_folder(tmp_path_factory.mktemp("model") / "hf", tokenizer, family, bos=bos), device="cpu"
    )


def write(path: Path, records: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def phrases(n: int, seed: int) -> list[str]:
    """`n` phrases of two or three words."""
    words = " ".join(synthetic_texts(40, seed)).split()
    rng = np.random.default_rng(seed)
    return [
        " ".join(words[at : at + size]) for at, size in zip(rng.integers(0, 150, n), rng.integers(2, 4, n), strict=True)
    ]


def reading_rows(n: int = 30) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for i, sentence in enumerate(phrases(n, 5)):
        *before, word = sentence.split()
        first = i % 5 == 0
        rows.append(
            {
                "item": " ".join(before),
                "word": " " + word,
                "prev_item": "" if first else before[0],
                "prev_word": "" if first else " " + before[-1],
                "Subtlex_log10": round(rng.uniform(1, 6), 3),
                "length": len(word),
                "context_length": len(before),
                "prev_length": "" if first else len(before[-1]),
                **{name: round(rng.uniform(100, 400), 1) for name in MEASUREMENTS},
                "N400": round(rng.normal(), 3),
            }
        )
    rows[7]["RTgopast"] = "NA"
    return rows


@pytest.fixture(scope="module")
def evaluation_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full_eval` with everything but the supplement, and `fast_eval` with two datasets."""
    folder = tmp_path_factory.mktemp("evaluation_data")
    full, some = folder / "full_eval", phrases(60, 1)
    named = {"field": "syntax_semantics", "linguistics_term": "island_effects"}
    for at, uid in ((0, "wh_island"), (7, "adjunct_island")):
        pairs = [
            {"sentence_good": some[at + i], "sentence_bad": some[at + i + 1], "UID": uid, **named} for i in range(6)
        ]
        write(full / f"blimp_filtered/{uid}.jsonl", pairs)
    supplement = [{"sentence_good": some[i], "sentence_bad": some[i + 3]} for i in range(5)]
    write(folder / "fast_eval/supplement_fast/hypernym.jsonl", supplement)
    write(
        full / "ewok_filtered/agent.jsonl",
        [
            {"Context1": some[i], "Context2": some[i + 1], "Target1": some[i + 2], "Target2": some[i + 3], "Domain": d}
            | {"ContextType": "direct", "ContextDiff": "antonym", "TargetDiff": "concept swap"}
            for i, d in zip(range(0, 24, 3), ["agent-properties", "social-relations"] * 4, strict=True)
        ],
    )
    for split in ("regular", "ambiref", "move_contents"):
        items = [
            {"input_prefix": some[i], "options": [f" {some[i + k]}." for k in range(1, 5)], "numops": i % 2 + 1}
            for i in range(7)
        ]
        write(full / f"entity_tracking/{split}.jsonl", items)
    for name in ("wug_adj_nominalization", "wug_past_tense"):
        items = [{"sentences": f"{some[i]}\t{some[i + 9]}", "ratio": i / 12} for i in range(12)]
        write(full / f"{name}/{name}.jsonl", items)
    for name in ("base", "wugs", "wugs_dist-before", "wugs_dist-in-between"):
        items = [
            {"prefix_acceptable": some[i], "prefix_unacceptable": some[i + 1], "property_phrase": some[i + 2]}
            for i in range(5)
        ]
        write(full / f"comps/comps_{name}.jsonl", items)
    write_csv(full / "reading/reading_data.csv", reading_rows())
    write_csv(folder / "fast_eval/reading/reading_data.csv", reading_rows())
    return folder


def score_of(model: EvalModel, text: str, scored: int) -> float:
    """The sum of log p, in float64, of the tokens that end behind the first scored character (dataset.py)."""
    tokenizer = model.need_tokenizer()
    assert isinstance(tokenizer, JsonTokenizer)
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    bos = model.encoding.bos_id
    ids, offsets = ([], []) if bos is None else ([bos], [(0, 0)])
    ids, offsets = [*ids, *encoded.ids], [*offsets, *encoded.offsets]
    with torch.no_grad():
        log_p = model.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(1, len(ids)) if offsets[i][1] > len(text) - scored)


def expected_candidates(name: str, record: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(text, scored characters, prediction) by read_files.py."""
    if name.startswith("blimp"):
        return [(s, len(s), s) for s in (record["sentence_good"], record["sentence_bad"])]
    if name == "ewok":
        targets = [" " + record["Target1"], " " + record["Target2"]]
        return [(record["Context1"] + t, len(t), t) for t in targets]
    if name == "entity_tracking":
        return [(record["input_prefix"] + o, len(o), o) for o in record["options"]]
    if name.startswith("wug"):
        return [(s, len(s), s) for s in record["sentences"].split("\t")]
    property_ = record["property_phrase"]
    wholes = [f"{record['prefix_acceptable']} {property_}", f"{record['prefix_unacceptable']} {property_}"]
    return [(whole, len(property_), whole) for whole in wholes]


def run(model: EvalModel, task: BabylmTask) -> Any:
    return run_babylm(task, model.scorer(400), model.aligned_encoder())


@pytest.mark.parametrize("name", ["blimp", "blimp_supplement", "ewok", "entity_tracking", "wug_adj", "comps"])
def test_scores_are_those_of_the_pipeline(model: EvalModel, evaluation_data: Path, name: str) -> None:
    task = next(task for task in read_babylm(evaluation_data)[0] if task.dataset.name == name)
    result, predictions = run(model, task)
    chosen: dict[str, list[tuple[str, bool]]] = {}
    shares, ratios = [], []
    for file in sorted(task.path.glob("*.jsonl")):
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            candidates = expected_candidates(name, record)
            totals = torch.tensor([score_of(model, text, n) for text, n, _ in candidates], dtype=torch.float64)
            best = int(totals.argmax())
            uid = {
                "blimp": record.get("UID"),
                "blimp_supplement": file.stem,
                "ewok": record.get("Domain"),
                "entity_tracking": f"{file.stem}_{record.get('numops')}_ops",
                "comps": file.stem.removeprefix("comps_").replace("-", "_"),
            }.get(name, name)
            chosen.setdefault(uid, []).append((candidates[best][2], best == 0))
            shares.append(float(totals.float().softmax(0)[0]))
            ratios.append(record.get("ratio"))
    for uid, found in chosen.items():
        listed = predictions[uid]["predictions"]
        assert [(p["id"], p["pred"]) for p in listed] == [(f"{uid}_{i}", text) for i, (text, _) in enumerate(found)]
    assert set(predictions) == set(chosen)
    assert result.n == len(task.items) == sum(len(found) for found in chosen.values())
    if name == "wug_adj":
        assert [p["prob"] for p in predictions[name]["predictions"]] == pytest.approx(shares, rel=1e-3, abs=1e-6)
        assert result.metrics["correlation"] == pytest.approx(spearman(shares, ratios))
        return
    parts = {uid: sum(right for _, right in found) / len(found) for uid, found in chosen.items()}
    average = sum(parts.values()) / len(parts)
    if name == "entity_tracking":
        splits = [[v for k, v in parts.items() if k.startswith(s)] for s in ("regular", "ambiref", "move_contents")]
        average = sum(sum(split) / len(split) for split in splits) / 3
    assert result.metrics["accuracy_macro"] == pytest.approx(average)
    assert result.metrics["accuracy"] == pytest.approx(sum(result.items) / result.n)
    assert result.metrics["ties"] == 0
    assert result.metrics["chance"] == (0.25 if name == "entity_tracking" else 0.5)


def test_a_token_that_reaches_into_the_scored_part_is_scored(model: EvalModel) -> None:
    encoder = model.aligned_encoder()
    for text in ("the man sees the small dog", "Über größe 日本 x"):
        ids, ends = encoder.encode(text)
        assert ids == model.encode([text])[0]
        assert ends == sorted(ends)
        assert ends[-1] == len(text)
        begin = 0 if encoder.bos_id is None else 1
        for start in range(len(text)):
            expected = begin + next(i for i, end in enumerate(ends) if end > start)
            assert encoder.split(text, start)[1] == max(expected, 1)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokens_end_where_their_text_ends(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for text in ("Grüße aus Würzburg", "日本 und \N{GRINNING FACE}!", "Der Hund läuft, 日."):
        ids, ends = tokenizers[kind].encode_aligned(text)
        assert ids == tokenizers[kind].encode(text).tolist()
        for i, end in enumerate(ends):
            decoded = tokenizers[kind].decode(ids[: i + 1])
            known = decoded.rstrip("\N{REPLACEMENT CHARACTER}")  # bytes of a character that is not complete
            assert text.startswith(known)
            assert end == len(known) + (known != decoded)


def test_equal_candidates_count_as_right_and_as_ties(model: EvalModel, tmp_path: Path) -> None:
    pair = {"prefix_acceptable": "the man", "prefix_unacceptable": "the man", "property_phrase": "sleeps"}
    write(tmp_path / "comps/comps_base.jsonl", [pair])
    (task,), _ = read_babylm(tmp_path)
    assert run(model, task)[0].metrics == {"accuracy": 1.0, "accuracy_macro": 1.0, "ties": 1.0, "chance": 0.5}


def test_texts_beyond_the_context_are_scored_and_counted(model: EvalModel, tmp_path: Path) -> None:
    long = " ".join(phrases(60, 2))
    write(
        tmp_path / "blimp_fast/x.jsonl",
        [{"sentence_good": "a man", "sentence_bad": long}, {"sentence_good": "a man", "sentence_bad": "a dog"}],
    )
    (task,), _ = read_babylm(tmp_path)
    result, _ = run(model, task)
    assert result.details == {"n_cut": 1}
    assert result.items[0] == 1.0  # hundreds of tokens have a smaller probability than two, if all are scored


def surprisal_of(model: EvalModel, context: str, word: str) -> float:
    """get_p2 of the pipeline's evaluation_functions.py."""
    total = 0.0
    for number, id in enumerate(model.encode([word])[0]):
        piece = model.need_tokenizer().decode([id])
        target = id if number == 0 else model.encode([piece])[0][0]
        ids = model.aligned_encoder().ids(context)
        with torch.no_grad():
            total -= float(model.model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[target])
        context += piece
    return total


def test_reading_times(model: EvalModel, evaluation_data: Path) -> None:
    task = next(task for task in read_babylm(evaluation_data)[0] if task.dataset.name == "reading")
    result, predictions = run(model, task)
    rows, listed = reading_rows(), predictions["reading"]["predictions"]
    assert [p["id"] for p in listed] == list(range(len(rows)))
    for row, p in zip(rows, listed, strict=True):
        assert p["pred"] == pytest.approx(surprisal_of(model, row["item"], row["word"]), rel=1e-4)
        if row["prev_item"]:
            assert p["prev_pred"] == pytest.approx(surprisal_of(model, row["prev_item"], row["prev_word"]), rel=1e-4)
        else:
            assert math.isnan(p["prev_pred"])
    table = {k: np.array([math.nan if r[k] in ("", "NA") else float(r[k]) for r in rows]) for k in list(rows[0])[4:]}
    table["pred"] = np.array([p["pred"] for p in listed])
    table["prev_pred"] = np.array([p["prev_pred"] for p in listed])
    plain = ["Subtlex_log10", "length", "context_length"]
    eyes = [squared_partial_correlation(table, name, plain) for name in MEASUREMENTS[:4]]
    assert result.metrics["eye_tracking"] == pytest.approx(np.mean(eyes), rel=1e-6, abs=1e-9)
    alone = squared_partial_correlation(table, MEASUREMENTS[4], [*plain, "prev_length", "prev_pred"])
    assert result.metrics["self_paced_reading"] == pytest.approx(alone, rel=1e-6, abs=1e-9)
    groups = result.groups["measurement"]
    assert groups["RTgopast"].n == len(rows) - 1
    assert groups["N400"].metrics["partial_r2"] == pytest.approx(squared_partial_correlation(table, "N400", plain))
    assert groups["N400"].metrics["correlation"] == pytest.approx(np.corrcoef(table["pred"], table["N400"])[0, 1])


def squared_partial_correlation(table: dict[str, Any], name: str, predictors: list[str]) -> float:
    """By the residuals of the measurement and of surprisal; equals (R2 with - R2 without) / (1 - R2 without)."""
    kept = ~np.isnan(np.stack([table[k] for k in (name, "pred", *predictors)])).any(0)
    columns = [table[k][kept] for k in predictors]
    x = np.stack([np.ones(kept.sum()), *columns, *(a * b for a, b in combinations(columns, 2))], 1)
    inverse = np.linalg.pinv(x, rcond=1e-15)
    y, pred = (table[k][kept] - x @ (inverse @ table[k][kept]) for k in (name, "pred"))
    return float((y @ pred) ** 2 / ((y @ y) * (pred @ pred)))


def test_a_regression_finds_the_coefficient_it_was_made_with() -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(50, 9, 300) for name in ("a", "b", "surprisal")}
    columns["y"] = 3 + 2 * columns["a"] - columns["a"] * columns["b"] / 7 + 0.25 * columns["surprisal"]
    found = regress(columns, "y", ("a", "b"))
    assert found.metrics["coefficient"] == pytest.approx(0.25)
    assert found.metrics["partial_r2"] == pytest.approx(1) == found.metrics["r2"]
    with pytest.raises(ValueError, match="y: 4 complete words are too few for 5 coefficients"):
        regress({name: values[:4] for name, values in columns.items()}, "y", ("a", "b"))


def test_spearman_shares_the_ranks_of_equal_values() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1], [1, 2]) == 0


def test_missing_data_is_named_and_the_rest_is_read(evaluation_data: Path) -> None:
    tasks, missing = read_babylm(evaluation_data)
    names = {task.name for task in tasks}
    assert {"babylm/blimp", "babylm/comps", "babylm_fast/blimp_supplement", "babylm_fast/reading"} < names
    assert "babylm/blimp_supplement" not in names
    assert "the BLiMP supplement (full_eval/supplement_filtered)" in missing
    assert [task.name for task in read_babylm(evaluation_data / "fast_eval")[0]] == [
        "babylm_fast/blimp_supplement",
        "babylm_fast/reading",
    ]
    with pytest.raises(ValueError, match="holds none of BabyLM's datasets"):
        read_babylm(evaluation_data / "full_eval/comps")
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_babylm(evaluation_data / "absent")


@pytest.mark.parametrize(
    ("file", "record", "fault"),
    [
        ("blimp_filtered/x.jsonl", {"sentence_good": "a"}, "the field 'sentence_bad' is missing"),
        ("ewok_filtered/x.jsonl", {"Context1": "a", "Domain": "d", "Target1": 3}, "'Target1' is 3"),
        ("entity_tracking/x.jsonl", {}, "entity tracking has the files regular.jsonl"),
        ("entity_tracking/regular.jsonl", {"input_prefix": "a", "options": ["b", "c"]}, "'numops' is None"),
        ("wug_past_tense/x.jsonl", {"sentences": "a b", "ratio": 1}, "'sentences' must hold two sentences with a tab"),
        ("wug_past_tense/x.jsonl", {"sentences": "a\tb", "ratio": "much"}, "'ratio' is 'much'"),
        ("comps/comps.jsonl", {"property_phrase": "a"}, "COMPS has the files comps_base.jsonl"),
    ],
)
def test_a_line_of_another_format_is_refused(tmp_path: Path, file: str, record: Any, fault: str) -> None:
    write(tmp_path / file, [record])
    with pytest.raises(ValueError, match=f"{file}, line 1: {fault}"):
        read_babylm(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"length": "long"}, "line 2: 'length' is 'long'; it must be a number"),
        ({"word": " "}, "line 2: 'word' is empty"),
        ({"N400": None}, None),
    ],
)
def test_a_row_of_another_format_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str | None) -> None:
    rows = reading_rows()
    write_csv(tmp_path / "reading/reading_data.csv", [rows[0] | changes, *rows[1:]])
    if fault is None:
        read_babylm(tmp_path)
        return
    with pytest.raises(ValueError, match=fault):
        read_babylm(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "reading/reading_data.csv", [{k: v for k, v in r.items() if k != "word"} for r in reading_rows()]
    )
    with pytest.raises(ValueError, match="line 1: the column 'word' is missing"):
        read_babylm(tmp_path)


def test_predictions_lie_where_the_pipeline_collates_them(
    model: EvalModel, evaluation_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results/mine/main"
    wanted = ("babylm/blimp", "babylm/wug_adj", "babylm/reading")
    tasks = {task.name: task for task in read_babylm(evaluation_data)[0]}
    written = {}
    for name in wanted:
        written[name] = run(model, tasks[name])[1]
        collated = write_predictions(folder, tasks[name], written[name], "sum")
    causal = folder / "zero_shot/causal"
    for place in ("blimp/blimp_filtered", "wug_adj/wug_adj_nominalization", "reading"):
        assert (causal / place / "predictions.json").is_file()
    assert collated == folder / "all_full_preds_causal.json"
    assert list(json.loads(collated.read_text())) == ["blimp", "wug_adj", "reading"]
    assert json.loads(collated.read_text())["blimp"] == written["babylm/blimp"]
    collated = write_predictions(folder, tasks["babylm/blimp"], written["babylm/blimp"], "other weights")
    assert list(json.loads(collated.read_text())) == ["blimp"]


def test_some_items_are_evenly_spaced(model: EvalModel, evaluation_data: Path) -> None:
    task = next(task for task in read_babylm(evaluation_data)[0] if task.name == "babylm/comps")
    result, _ = run_babylm(task, model.scorer(), model.aligned_encoder(), most=4)
    assert result.n == 4
    reading = next(task for task in read_babylm(evaluation_data)[0] if task.name == "babylm/reading")
    assert run_babylm(reading, model.scorer(), model.aligned_encoder(), most=4)[0].n == len(reading.items)
    assert {name: group.n for name, group in result.groups["category"].items()} == {
        name: 1 for name in ("base", "wugs", "wugs_dist_before", "wugs_dist_in_between")
    }


def test_evaluate_scores_what_there_is_and_writes_predictions(
    model: EvalModel, evaluation_data: Path, tmp_path: Path
) -> None:
    settings = EvaluationSettings(
        tasks=(f"babylm:{evaluation_data / 'fast_eval'}",), output=tmp_path / "out.json", device="cpu"
    )
    said: list[str] = []
    results, output = evaluate(model.path, settings, said.append)
    assert list(results.tasks) == ["babylm_fast/blimp_supplement", "babylm_fast/reading"]
    (warning,) = [line for line in said if "left out" in line]
    absent = (
        "BLiMP (blimp_fast), EWoK (ewok_fast), entity tracking (entity_tracking_fast), "
        "WUG adjectives (wug_adj_nominalization), WUG past tense (wug_past_tense)"
    )
    assert warning == f"warning: {evaluation_data / 'fast_eval'} holds no data of {absent}: left out"
    assert read_results(output).tasks["babylm_fast/reading"].kind == "reading"
    collated = tmp_path / "babylm" / model.path.stem / "main" / "all_fast_preds_causal.json"
    assert results.tasks["babylm_fast/reading"].details["predictions"] == [str(collated)]
    assert list(json.loads(collated.read_text())) == ["blimp_supplement", "reading"]
    said.clear()
    evaluate(model.path, settings, said.append)
    assert sum("done before" in line for line in said) == len(results.tasks)


def test_data_is_checked_before_the_first_checkpoint(evaluation_data: Path, tmp_path: Path) -> None:
    check_given(EvaluationSettings(tasks=(f"babylm:{evaluation_data}",)))
    write(tmp_path / "comps/comps_base.jsonl", [{}])
    with pytest.raises(ValueError, match="line 1: the field 'property_phrase' is missing"):
        check_given(EvaluationSettings(tasks=(f"babylm:{tmp_path}",)))


def test_revisions_are_named_as_in_the_challenge(
    generation_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = tmp_path / "mine" / "chck_10M"
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    assert name_and_revisions(exported, "fast") == ("mine", ["chck_10M"])
    newest = list_checkpoints(generation_run)[-1]
    older = newest.with_name("iter-00000001-ckpt.pth")
    assert name_and_revisions(newest, "fast") == ("run", ["main"])

    meta: dict[str, Any] = {}
    monkeypatch.setattr(babylm_tasks, "Checkpoint", lambda path: SimpleNamespace(meta=meta))
    assert name_and_revisions(older, "full") == ("run", ["iter-00000001"])
    meta["word_budgets"] = [1_000_000, 2_000_000]
    assert name_and_revisions(newest, "full") == ("run", ["main"])
    assert name_and_revisions(newest, "fast") == name_and_revisions(older, "full") == ("run", ["chck_1M", "chck_2M"])
