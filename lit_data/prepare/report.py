"""What a stage of the preparation removed and why: counts and the first samples of each reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lit_data.corpus.readers import Document

SAMPLES = 3  # kept of each reason
SAMPLE_CHARACTERS = 80


@dataclass(frozen=True)
class Sample:
    """One thing that was removed: the document it was, or came from, the reason in full, and how its text begins."""

    id: str
    source: str
    place: int
    reason: str
    text: str


@dataclass
class Removed:
    """What was removed for one kind of reason."""

    pieces: int = 0
    characters: int = 0
    samples: list[Sample] = field(default_factory=list)


class StageReport:
    """Counts of one stage (one cleaner, one filter, one deduplication).

    A reason is `kind` or `kind: detail` ("too short: 57 characters"); removed pieces are counted by kind, and the
    samples of a kind, the first three, show the details. Merging the reports of parts in their order gives the report
    of the whole.

    Attributes:
        documents_in, characters_in: what came.
        documents_kept, characters_kept: what went on to the next stage.
        removed: by kind; its pieces are documents, or for deduplication paragraphs of them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.documents_in = self.characters_in = 0
        self.documents_kept = self.characters_kept = 0
        self.removed: dict[str, Removed] = {}

    def count(self, before: str, after: str | None) -> None:
        """One document passed the stage: its text before, and what is left of it (None: the document is dropped)."""
        self.documents_in += 1
        self.characters_in += len(before)
        if after is not None:
            self.documents_kept += 1
            self.characters_kept += len(after)

    def add(self, reason: str, document: Document, text: str, characters: int | None = None) -> None:
        """One thing was removed: `text`, a whole document or a piece of it; it counts as its length or `characters`."""
        removed = self.removed.setdefault(reason.partition(": ")[0], Removed())
        removed.pieces += 1
        removed.characters += len(text) if characters is None else characters
        if len(removed.samples) < SAMPLES:
            removed.samples.append(
                Sample(document.id, document.source, document.place, reason, text[:SAMPLE_CHARACTERS])
            )

    def add_change(self, reason: str, document: Document, before: str, after: str) -> None:
        """A document was changed, not dropped; the sample is its text from the first place that differs."""
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
        """For people: a line of totals, a line a reason, a line a sample."""
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
    """The first place where two texts differ; the length of the shorter one when it begins the other."""
    low, high = 0, min(len(a), len(b))  # equal up to low; bisection compares slices, not characters one by one
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
