"""Reports of stages."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from lit_data.corpus.readers import Document
from lit_data.prepare.report import StageReport, first_difference


def document(number: int, text: str = "") -> Document:
    return Document(f"doc-{number}", text, "corpus.jsonl", number, {})


def filtered(numbers: range) -> StageReport:
    """The report of a filter that keeps every fourth document."""
    report = StageReport("length")
    for n in numbers:
        text = f"text {n} " * n
        reason = None if n % 4 == 0 else f"too short: {n} words" if n % 4 == 1 else "odd"
        report.count(text, text if reason is None else None)
        if reason is not None:
            report.add(reason, document(n), text)
    return report


def test_counts_by_kind_with_the_first_samples() -> None:
    report = filtered(range(20))
    lengths = [len(f"text {n} " * n) for n in range(20)]
    assert (report.documents_in, report.characters_in) == (20, sum(lengths))
    assert (report.documents_kept, report.characters_kept) == (5, sum(lengths[::4]))
    assert {kind: r.pieces for kind, r in report.removed.items()} == {"too short": 5, "odd": 10}
    assert report.removed["too short"].characters == sum(lengths[1::4])
    samples = report.removed["too short"].samples
    assert [(s.id, s.source, s.place, s.reason) for s in samples] == [
        (f"doc-{n}", "corpus.jsonl", n, f"too short: {n} words") for n in (1, 5, 9)
    ]
    assert [s.text for s in samples] == [(f"text {n} " * n)[:80] for n in (1, 5, 9)]


@given(st.integers(0, 30), st.integers(0, 30))
def test_reports_of_parts_merge_into_the_report_of_the_whole(a: int, b: int) -> None:
    a, b = sorted((a, b))
    merged = StageReport("length")
    for part in (range(a), range(a, b), range(b, 30)):
        merged.merge(StageReport.from_dict(json.loads(json.dumps(filtered(part).to_dict()))))
    assert merged.to_dict() == filtered(range(30)).to_dict()


def test_a_sample_shows_where_a_change_begins() -> None:
    report = StageReport("cleaner")
    before, after = "x" * 1000 + "[12] and more " * 10, "x" * 1000 + " and more " * 10
    report.count(before, after)
    report.add_change("changed", document(1), before, after)
    report.add_change("changed", document(2), "same", "same")
    removed = report.removed["changed"]
    assert (removed.pieces, removed.characters) == (1, 40)
    assert removed.samples[0].text == ("[12] and more " * 10)[:80]


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_first_difference(a: str, b: str) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert first_difference(a, b) == expected


def test_the_summary_lists_removals() -> None:
    lines = filtered(range(8)).summary().splitlines()
    assert lines[0] == "length: 2 of 8 documents kept, 28 of 196 characters"
    assert lines[1] == "  odd: 4 (126 characters)"
    assert lines[2] == "    doc-2 (corpus.jsonl:2): 'text 2 text 2 '"
    assert lines[-2].startswith("    doc-1 (corpus.jsonl:1) 1 words: 'text 1 '")
