"""Reports of a preparation: removals per stage with reasons, and totals per dataset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_data.corpus.files import ReadErrors
from lit_data.corpus.readers import Document

SAMPLES = 3  # samples kept per reason
SAMPLE_CHARACTERS = 80
COUNTED = ("documents", "tokens", "bytes", "words")


@dataclass(frozen=True)
class Sample:
    """A removed document or piece: its document, the full reason, and the start of its text."""

    id: str
    source: str
    place: int
    reason: str
    text: str


@dataclass
class Removed:
    """Counts and samples of removals for one kind of reason."""

    pieces: int = 0
    characters: int = 0
    samples: list[Sample] = field(default_factory=list)


class StageReport:
    """Counts of one stage (one cleaner, one filter, one deduplication).

    A reason is `kind` or `kind: detail` ("too short: 57 characters"); removed pieces are counted by kind, and the first
    three samples of a kind show the details. Merging the reports of the parts in order gives the full report.

    Attributes:
        documents_in, characters_in: input of the stage.
        documents_kept, characters_kept: output to the next stage.
        removed: by kind; the pieces are documents, or paragraphs for deduplication.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.documents_in = self.characters_in = 0
        self.documents_kept = self.characters_kept = 0
        self.removed: dict[str, Removed] = {}

    def count(self, before: str, after: str | None) -> None:
        """Count one document: its text before and after the stage (None: the document is dropped)."""
        self.documents_in += 1
        self.characters_in += len(before)
        if after is not None:
            self.documents_kept += 1
            self.characters_kept += len(after)

    def add(self, reason: str, document: Document, text: str, characters: int | None = None) -> None:
        """Record a removal: `text`, a document or a piece of it, counted by its length or as `characters`."""
        removed = self.removed.setdefault(reason.partition(": ")[0], Removed())
        removed.pieces += 1
        removed.characters += len(text) if characters is None else characters
        if len(removed.samples) < SAMPLES:
            removed.samples.append(
                Sample(document.id, document.source, document.place, reason, text[:SAMPLE_CHARACTERS])
            )

    def add_change(self, reason: str, document: Document, before: str, after: str) -> None:
        """Record a changed document; the sample is its text from the first difference."""
        if before != after:
            text = before[first_difference(before, after) :][:SAMPLE_CHARACTERS]
            self.add(reason, document, text, characters=max(0, len(before) - len(after)))

    def merge(self, other: StageReport) -> None:
        """Add the counts of a later part."""
        assert self.name == other.name, f"{self.name} and {other.name} are two stages"
        self.documents_in += other.documents_in
        self.characters_in += other.characters_in
        self.documents_kept += other.documents_kept
        self.characters_kept += other.characters_kept
        for kind, theirs in other.removed.items():
            ours = self.removed.setdefault(kind, Removed())
            ours.pieces += theirs.pieces
            ours.characters += theirs.characters
            ours.samples.extend(theirs.samples[: SAMPLES - len(ours.samples)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {
            "name": self.name,
            "documents_in": self.documents_in,
            "characters_in": self.characters_in,
            "documents_kept": self.documents_kept,
            "characters_kept": self.characters_kept,
            "removed": {kind: asdict(removed) for kind, removed in self.removed.items()},
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> StageReport:
        """The report that `to_dict` gave."""
        report = cls(content["name"])
        for count in ("documents_in", "characters_in", "documents_kept", "characters_kept"):
            setattr(report, count, content[count])
        for kind, removed in content["removed"].items():
            samples = [Sample(**sample) for sample in removed["samples"]]
            report.removed[kind] = Removed(removed["pieces"], removed["characters"], samples)
        return report

    def summary(self) -> str:
        """Human-readable: one line of totals, one per reason, one per sample."""
        lines = [
            f"{self.name}: {self.documents_kept:,} of {self.documents_in:,} documents kept, "
            f"{self.characters_kept:,} of {self.characters_in:,} characters"
        ]
        for kind, removed in sorted(self.removed.items(), key=lambda item: (-item[1].pieces, item[0])):
            lines.append(f"  {kind}: {removed.pieces:,} ({removed.characters:,} characters)")
            for sample in removed.samples:
                where = f"{sample.source}:{sample.place}" if sample.place else sample.source
                detail = sample.reason.partition(": ")[2]
                lines.append(f"    {sample.id} ({where}){f' {detail}' if detail else ''}: {sample.text!r}")
        return "\n".join(lines)


def first_difference(a: str, b: str) -> int:
    """Index of the first difference of two texts; the shorter length if one is a prefix of the other."""
    low, high = 0, min(len(a), len(b))  # equal up to `low`; bisection compares slices instead of single characters
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class StageReports:
    """A StageReport for each stage, in order, and counts.

    Attributes:
        stages: by name.
        empty: documents without text or tokens.
        fields: metadata fields that were seen.
    """

    stages: dict[str, StageReport] = field(default_factory=dict)
    empty: int = 0
    fields: set[str] = field(default_factory=set)

    def stage(self, name: str) -> StageReport:
        """The report of a stage, created if missing."""
        return self.stages.setdefault(name, StageReport(name))

    def merge(self, other: StageReports) -> None:
        """Add the report of later documents."""
        for name, stage in other.stages.items():
            self.stage(name).merge(stage)
        self.empty += other.empty
        self.fields |= other.fields

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        stages = [s.to_dict() for s in self.stages.values()]
        return {"stages": stages, "empty": self.empty, "fields": sorted(self.fields)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> StageReports:
        """The report that `to_dict` gave."""
        stages = [StageReport.from_dict(s) for s in content["stages"]]
        return cls({s.name: s for s in stages}, content["empty"], set(content["fields"]))


@dataclass
class Counts:
    """Totals of one dataset. `tokens` includes each document's BOS and EOS, `bytes` are UTF-8 bytes of the text,
    `words` are separated by whitespace.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0


@dataclass
class PrepareReport:
    """The report of a preparation.

    Attributes:
        sides: counts of `train` and, if there is one, `val`.
        stage_reports: removals per stage with reasons, and documents without tokens, which are left out.
        errors: documents that could not be read (with on_error="skip"), and files of other kinds.
        seconds: duration of this call.
        resumed: whether this call resumed an earlier one.
        bloom_rate: the Bloom filter's false positive rate at the end.
    """

    output: Path
    sides: dict[str, Counts]
    stage_reports: StageReports = field(default_factory=StageReports)
    errors: ReadErrors = field(default_factory=ReadErrors)
    workers: int = 1
    seconds: float = 0.0
    dry_run: bool = False
    resumed: bool = False
    bloom_rate: float | None = None

    @property
    def empty_documents(self) -> int:
        return self.stage_reports.empty

    @property
    def total(self) -> Counts:
        sides = self.sides.values()
        return Counts(*(sum(getattr(s, kind) for s in sides) for kind in COUNTED))

    def summary(self) -> str:
        """A human-readable summary of several lines."""
        lines = ["dry run: nothing was written; it would hold" if self.dry_run else f"wrote {self.output}"]
        for name, side in self.sides.items():
            per_token = f", {side.bytes / side.tokens:.3f} bytes per token" if side.tokens else ""
            lines.append(
                f"  {name + ':':6} {side.documents:,} documents, {side.tokens:,} tokens, {side.bytes:,} bytes of text"
                f"{per_token}, {side.words:,} words"
            )
        rate = self.total.bytes / 1e6 / self.seconds if self.seconds else 0.0
        speed = " (the rest was done before)" if self.resumed else f", {rate:.2f} MB/s"
        lines.append(f"  {self.seconds:.1f} s with {self.workers} workers{speed}")
        lines.append(f"  skipped: {self.errors.count:,} unreadable documents, {self.empty_documents:,} empty ones")
        lines.extend(f"    {message}" for message in self.errors.first)
        if self.errors.count > len(self.errors.first):
            lines.append(f"    and {self.errors.count - len(self.errors.first):,} more")
        if self.errors.ignored_files:
            names = ", ".join(self.errors.ignored_first)
            more = ", ..." if self.errors.ignored_files > len(self.errors.ignored_first) else ""
            lines.append(f"  files of other kinds, not read: {self.errors.ignored_files:,} ({names}{more})")
        for stage in self.stage_reports.stages.values():
            lines.extend(f"  {line}" for line in stage.summary().splitlines())
        if self.bloom_rate is not None:
            lines.append(
                f"  Bloom filter: false positive rate at the end {self.bloom_rate:.2e} (new paragraphs dropped as seen)"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The content of OUTPUT/report.json."""
        errors = {"count": self.errors.count, "first": self.errors.first, "ignored_files": self.errors.ignored_files}
        return {"sides": {k: vars(c) for k, c in self.sides.items()}, "errors": errors, **self.stage_reports.to_dict()}
