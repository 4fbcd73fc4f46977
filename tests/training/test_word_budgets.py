"""Words seen, counted against the record, and checkpoints at word budgets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import ROLLBACK, SPIKE, flags, metrics, same_checkpoints, script, shared_rank_server, train, write_dataset
from whole_record import read_record

from lit_data.loading import words as words_module
from lit_data.loading.mixture import Mixture, phase_list
from lit_data.loading.order import Order, Segment
from lit_data.loading.rows import open_rows
from lit_data.loading.words import DatasetWords, document_words, window_words, words_between
from lit_data.packed.reader import PackedDataset
from lit_files.checkpoint_name import budget_name, list_checkpoints
from lit_model.load import Checkpoint
from pretrain.args import BABYLM, EvalArgs, SaveArgs
from pretrain.preflight.machine import budgets_within
from pretrain.word_budgets import count_words, first_step, words_after

LENGTHS = np.random.default_rng(3).integers(1, 60, size=60).tolist()
WORDS = [int(n * x) for n, x in zip(LENGTHS, np.random.default_rng(4).uniform(0, 2, size=60), strict=True)]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train, whose documents differ in words per token."""
    folder = tmp_path_factory.mktemp("counted")
    write_dataset(folder / "train", LENGTHS, words=WORDS)
    return folder


def naive(pieces: Any) -> int:
    """Words of some (document, start, length), one after another."""
    total = 0
    for document, start, length in pieces:
        words, tokens = WORDS[document], LENGTHS[document] + 1  # and EOS
        total += words * (start + length) // tokens - words * start // tokens
    return total


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@pytest.mark.parametrize("block", [0, 4])
def test_words_of_rows_and_of_the_first_rows(
    counted: Path, tmp_path: Path, packing: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words_module, "BLOCK", 4)
    monkeypatch.setattr(words_module, "ROWS_AT_ONCE", 8)
    dataset = PackedDataset(counted / "train")
    assert document_words(dataset).tolist() == WORDS and dataset.n_words == sum(WORDS)
    rows = open_rows(dataset, packing, 32, tmp_path)
    per_window = window_words(rows)
    for window in range(rows.n_windows):
        p = rows.pieces(np.asarray([window]))
        assert per_window[window] == naive(zip(p.document, p.start, p.length, strict=True))
    assert per_window.sum() == sum(WORDS)
    order = Order(rows.n_windows, seed=5, block_windows=block, group_blocks=2)
    _, windows = order.locate(np.arange(3 * rows.n_windows))
    expected = np.concatenate([[0], np.cumsum(per_window[windows])])
    counts = DatasetWords(rows, order)
    for n in [*range(0, len(expected), 3), *range(len(expected) - 1, -1, -7)]:
        assert counts.first(n) == expected[n]
    monkeypatch.setattr(words_module, "MAX_WINDOWS", 3)
    mean = DatasetWords(rows, order)
    assert not mean.exact and mean.first(2 * rows.n_windows) == 2 * sum(WORDS)


def test_words_of_a_mixture_with_phases_and_of_segments(counted: Path) -> None:
    rows = open_rows(PackedDataset(counted / "train"), "concat", 32)
    orders = tuple(Order(rows.n_windows, seed=1, dataset=d) for d in range(2))
    mixture = Mixture(orders, phase_list([(0, [1.0, 3.0]), (100, [2.0, 1.0])]), seed=1)
    counts, per_window = [DatasetWords(rows, order) for order in orders], window_words(rows)
    _, _, windows = mixture.locate(np.arange(300))
    cumulative = np.concatenate([[0], np.cumsum(per_window[windows])])
    for first, stop in ((0, 0), (0, 1), (0, 300), (37, 41), (90, 250)):
        assert words_between(counts, mixture, first, stop) == cumulative[stop] - cumulative[first]
    # Steps 3 and on leave samples 24 to 39 out; from step 10 on a step has 4 rows; the data ends at sample 120.
    segments = [Segment(0, 0, 8), Segment(3, 40, 8), Segment(10, 96, 4)]
    data: Any = SimpleNamespace(mixture=mixture, end_sample=120)
    used = [*range(24), *range(40, 120)]
    for step, n in ((0, 0), (3, 24), (5, 40), (10, 80), (12, 88), (16, 104), (20, 104)):
        expected = sum(cumulative[s + 1] - cumulative[s] for s in used[:n])
        for words_at in ((0, 0), (3, int(cumulative[24])), (5, sum(int(per_window[windows[s]]) for s in used[:40]))):
            if step >= words_at[0]:
                progress: Any = SimpleNamespace(segments=segments, words_at=words_at)
                assert words_after(counts, data, progress, step) == expected


def test_the_first_step_at_or_past_a_budget() -> None:
    after = [0, 5, 5, 9, 20]
    assert [first_step(after.__getitem__, b, 0, 4) for b in (1, 5, 6, 9, 10, 20)] == [1, 1, 3, 3, 4, 4]


def short(counted: Path, run: Path, **changes: object) -> list[str]:
    """Two epochs in 14 steps; a checkpoint only at the end, of which one is kept."""
    given: dict[str, object] = {
        "data__val": None,
        "train__max_steps": None,
        "train__max_epochs": 2,
        "save__every_steps": 100,
        "save__keep_last": 1,
        "save__at_words": "100,0.2K,1500 1510",
    }
    return flags(counted, run, **{**given, **changes})


@pytest.fixture(scope="module")
def whole(counted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(*short(counted, run))
    return run


def budget_steps(run: Path) -> dict[int, int]:
    """The step of each budget, by the rows of metrics.csv."""
    after = [int(row["words"]) for row in metrics(run)]  # a row a step, without that of step 0
    first = int(metrics(run)[0]["step"])
    return {b: first + next(i for i, words in enumerate(after) if words >= b) for b in (100, 200, 1500, 1510)}


def names_in(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


def check_words(run: Path) -> None:
    """Every row's words are those of the spans that the record names up to its step."""
    spans = read_record(run).to_pylist()
    for row in metrics(run):
        seen = [(s["document"], s["start"], s["length"]) for s in spans if s["step"] < int(row["step"])]
        assert int(row["words"]) == naive(seen)


def test_words_are_those_of_the_record(whole: Path) -> None:
    check_words(whole)
    assert int(metrics(whole)[-1]["words"]) == 2 * sum(WORDS)
    assert Checkpoint(list_checkpoints(whole)[-1]).meta["words"] == 2 * sum(WORDS)


def test_checkpoints_at_budgets_are_kept(whole: Path) -> None:
    steps = budget_steps(whole)
    assert steps[1500] == steps[1510]  # both in one step
    last = int(metrics(whole)[-1]["step"])
    assert names_in(whole) == [f"iter-{step:08d}-ckpt.pth" for step in sorted({*steps.values(), last})]
    meta = {step: Checkpoint(whole / f"iter-{step:08d}-ckpt.pth").meta for step in {*steps.values(), last}}
    assert meta[steps[1500]]["word_budgets"] == [1500, 1510] and meta[last]["word_budgets"] == []
    assert meta[steps[100]]["word_budgets"] == [b for b in steps if steps[b] == steps[100]]


def test_two_ranks_stopped_and_resumed_without_the_flag_keep_them(counted: Path, whole: Path, tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", shared_rank_server()
    two = short(counted, run, devices=2, strategy="ddp")
    stop = budget_steps(whole)[1500]
    strike = {"kind": "signal", "rank": 1, "name": "SIGUSR1", "when": "step", "number": stop - 1}
    done = ranks.run(2, run, two, plants=[strike])
    assert done.statuses == [0, 0] and f"after step {stop - 1}" in done.output
    assert ranks.run(2, run, [*two, "--resume=latest"]).statuses == [0, 0]
    assert names_in(run) == names_in(whole)
    assert [row["words"] for row in metrics(run)] == [row["words"] for row in metrics(whole)]
    for name in names_in(run):
        ours, theirs = (Checkpoint(folder / name).meta for folder in (run, whole))
        assert all(ours[key] == theirs[key] for key in ("words", "word_budgets", "tokens"))
    more = {"save__at_words": None, "train__max_epochs": 3, "resume": "latest", "resume_allow": "train.max_epochs"}
    train(*short(counted, run, **more))
    assert names_in(run)[:-1] == names_in(whole)[:-1]


def test_a_finished_run_is_resumed_with_other_budgets(counted: Path, tmp_path: Path) -> None:
    """The last step of the first run has empty rows, whose samples are never seen: words are those of the record."""
    run = tmp_path / "run"
    train(*short(counted, run, train__max_epochs=1))
    more = {"resume": "latest", "resume_allow": "train.max_epochs,train.max_steps"}
    done = train(*short(counted, run, save__at_words="100,3M,60", **more))
    assert "warning: --save.at_words 0.00006M: passed before step" in done.stdout
    assert "warning: --save.at_words 3M: not reached, the run ends after" in done.stdout
    assert int(metrics(run)[-1]["words"]) < 2 * sum(WORDS)
    check_words(run)


def test_a_rollback_counts_only_what_was_seen(counted: Path, tmp_path: Path) -> None:
    """Steps 11 to 14 are discarded and their samples left out; budgets are found anew."""
    run = tmp_path / "run"
    changes = {"train__max_epochs": None, "save__keep_last": 3, "save__at_words": "1K,3500,4500"}
    done = shared_rank_server().run(1, run, short(counted, run, **ROLLBACK, **changes), plants=[SPIKE])
    assert done.statuses == [0] and "rolling back to iter-00000010-ckpt.pth" in done.output, done.output
    check_words(run)
    words = {int(row["step"]): int(row["words"]) for row in metrics(run)}
    steps = [min(step for step, seen in words.items() if seen >= budget) for budget in (1000, 3500, 4500)]
    assert steps[0] < 10 < steps[1] < steps[2]
    found = {path.name: Checkpoint(path).meta["word_budgets"] for path in list_checkpoints(run)}
    budgets = {f"iter-{step:08d}-ckpt.pth": [budget] for step, budget in zip(steps, (1000, 3500, 4500), strict=True)}
    assert {name: some for name, some in found.items() if some} == budgets


def test_budgets_are_listed_and_exported(whole: Path, tmp_path: Path) -> None:
    steps = budget_steps(whole)
    told = script("inspect_checkpoint.py", whole)
    assert f"at 0.0015M words: iter-{steps[1500]:08d}-ckpt.pth" in told.stdout
    assert f"{2 * sum(WORDS):,} words" in told.stdout
    one = json.loads(script("inspect_checkpoint.py", whole / f"iter-{steps[1500]:08d}-ckpt.pth", "--json").stdout)
    assert one["word_budgets"] == ["0.0015M", "0.00151M"]
    first = script("convert_to_hf.py", "--checkpoint", whole, "--output", tmp_path, "--word_budgets")
    assert first.returncode == 0, first.stderr
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["chck_0.0001M", "chck_0.0002M", "chck_0.00151M", "chck_0.0015M"]
    weights = [(tmp_path / f"chck_{name}" / "model.safetensors").read_bytes() for name in ("0.0015M", "0.00151M")]
    assert weights[0] == weights[1] != (tmp_path / "chck_0.0001M" / "model.safetensors").read_bytes()
    again = script("convert_to_hf.py", "--checkpoint", whole, "--output", tmp_path, "--word_budgets")
    assert again.stdout.count("exists already; left unchanged") == 4


def test_many_epochs_give_one_warning(counted: Path, tmp_path: Path) -> None:
    few = {"save__at_words": "100", "train__global_batch_samples": 64, "train__micro_batch_samples": 64}
    done = train(*short(counted, tmp_path / "a", **few, train__max_epochs=10.5))
    assert done.stdout.count("BabyLM allows at most 10 epochs") == 1 and "passes 10.5" in done.stdout
    assert "BabyLM" not in train(*short(counted, tmp_path / "b", **few, train__max_epochs=10)).stdout
    without = {**few, "save__at_words": None}  # not a run by BabyLM's rules
    assert "BabyLM" not in train(*short(counted, tmp_path / "c", **without, train__max_epochs=10.5)).stdout


def test_uncounted_data_is_refused(data: Path, tmp_path: Path) -> None:
    done = train(*flags(data, tmp_path / "run", save__at_words="1M"), check=False)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "--save.at_words: the words of" in done.stderr and "scripts/count_words.py" in done.stderr
    train(*flags(data, tmp_path / "run", train__max_steps=2))
    assert all(row["words"] == "" for row in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    ("given", "budgets"),
    [
        ([], []),
        ("", []),
        ("1M,2M,5M", [10**6, 2 * 10**6, 5 * 10**6]),
        ("5M 1.5m, 500K", [500_000, 1_500_000, 5_000_000]),
        (["2M", 1000, "1_000"], [1000, 2_000_000]),
        ("babylm", [n * 10**6 for n in [*range(1, 11), *range(20, 101, 10)]]),
        ("babylm_strict", [n * 10**6 for n in [*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100)]]),
        ("babylm,1B", [*BABYLM, 10**9]),
    ],
)
def test_forms_of_the_budgets(given: Any, budgets: list[int]) -> None:
    assert SaveArgs(at_words=given).word_budgets == budgets
    assert SaveArgs(at_words=SaveArgs(at_words=given).at_words).word_budgets == budgets


@pytest.mark.parametrize("wrong", ["1X", "-1M", "0", "0.5", "babyml", "1e6", "1.0000001M", "9" * 30])
def test_wrong_budgets_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"--save\.at_words"):
        SaveArgs(at_words=wrong)


def test_a_damaged_table_of_documents_costs_the_words_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --save.at_words it is an error; otherwise a warning, and the run trains without the column."""
    folder = write_dataset(tmp_path / "train", LENGTHS, words=WORDS)
    table = next(folder.glob("*.docs.parquet"))
    table.write_bytes(bytes(table.stat().st_size))
    rows = open_rows(PackedDataset(folder), "concat", 32)
    data: Any = SimpleNamespace(rows=[rows], train=[rows.dataset], mixture=Mixture.single(Order(rows.n_windows)))
    args: Any = SimpleNamespace(save=SaveArgs(), eval=EvalArgs(), data=SimpleNamespace(mock=False))
    assert count_words(args, data) == []
    assert f"words are not counted: {table}" in capsys.readouterr().err
    args.save = SaveArgs(at_words="1M")
    with pytest.raises(ValueError, match=table.name):
        count_words(args, data)


def test_preflight_expects_the_checkpoints_of_budgets_within_reach(counted: Path) -> None:
    datasets = SimpleNamespace(train=[PackedDataset(counted / "train")], block_size=32)
    args = SimpleNamespace(save=SaveArgs(at_words="100,2K,babylm"), train=SimpleNamespace(global_batch_samples=8))
    reach = {5: 1, 40: 2, None: 21}  # steps of 256 tokens, about one word each
    for steps, n in reach.items():
        context: Any = SimpleNamespace(args=args, datasets=datasets, max_steps=steps)
        assert budgets_within(context) == n


def test_names_of_budgets() -> None:
    assert [budget_name(n) for n in (10**6, 10**7, 10**9, 1_500_000, 7)] == ["1M", "10M", "1000M", "1.5M", "0.000007M"]


def test_the_state_is_that_of_a_run_without_budgets(counted: Path, whole: Path, tmp_path: Path) -> None:
    train(*short(counted, tmp_path / "run", save__at_words=None))
    same_checkpoints(list_checkpoints(tmp_path / "run")[-1], list_checkpoints(whole)[-1])
