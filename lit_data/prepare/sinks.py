"""Sinks for the results of a preparation's stages; each can be reopened from the state of its last commit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from lit_data.packed.writer import PackedWriter
from lit_data.prepare.bloom import BloomDedup
from lit_data.prepare.exact_dedup import HashWriter
from lit_data.prepare.near_dedup import SignatureWriter
from lit_data.prepare.report import COUNTED, StageReports
from lit_data.prepare.worker import Encoded, Hashed


class Sink(Protocol):
    """Receives the results of a stage."""

    def write(self, result: Any) -> None: ...
    def commit(self, number: int, done: bool) -> dict[str, Any]:
        """Make the results of documents before `number` durable; returns the state from which a new sink resumes."""
        ...

    def close(self) -> None:
        """Close open files, finished or not."""
        ...


class HashSink:
    """Writes hashes and signatures, one chunk of files per commit: PART/hashes-00000.parquet and so on."""

    def __init__(self, folder: Path, near: bool, state: dict[str, Any] | None, number: int) -> None:
        self.folder, self.near = folder, near
        self.chunks: list[list[int]] = state["chunks"] if state else []
        self._open(number)

    def _open(self, number: int) -> None:
        self._first = number
        chunk = self.folder / str(len(self.chunks))
        self._hashes = HashWriter(chunk_file("hashes", chunk))
        self._signatures = SignatureWriter(chunk_file("signatures", chunk)) if self.near else None

    def write(self, result: Hashed) -> None:
        for number, hashes in zip(result.numbers, result.paragraphs, strict=True):
            self._hashes.add(number, hashes)
        if self._signatures is not None:
            for number, signature in zip(result.numbers, result.signatures, strict=True):
                self._signatures.add(number, signature)

    def commit(self, number: int, done: bool) -> dict[str, Any]:
        self._hashes.close()
        if self._signatures is not None:
            self._signatures.close()
        self.chunks.append([self._first, number])
        if not done:
            self._open(number)
        return {"chunks": self.chunks}

    def close(self) -> None:
        self._hashes.abandon()
        if self._signatures is not None:
            self._signatures.abandon()


class EncodeSink:
    """Writes the packed datasets of a part, PART/train and PART/val, and the Bloom filter for them."""

    def __init__(
        self,
        folder: Path,
        writers: dict[str, PackedWriter],
        bloom: BloomDedup | None,
        state: dict[str, Any] | None,
    ) -> None:
        self.folder, self.writers, self.bloom = folder, writers, bloom
        self._bloom_file: str | None = state.get("bloom") if state else None  # named in the progress file
        self.report = StageReports.from_dict(state["report"]) if state else StageReports()

    def write(self, result: Encoded) -> None:
        self.report.merge(result.report)
        for side, (tokens, lengths, rows) in result.sides.items():
            self.writers[side].add_batch(tokens, lengths, rows)

    def commit(self, number: int, done: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"report": self.report.to_dict()}
        if done:
            for writer in self.writers.values():
                writer.finish()
            if self.bloom is not None:
                state["bloom_rate"] = self.bloom.rate()
            return state
        state["sides"] = {side: writer.state() for side, writer in self.writers.items()}
        if self.bloom is not None:
            for path in self.folder.glob("bloom-*.bin"):
                if path.name != self._bloom_file:
                    path.unlink()
            self._bloom_file = state["bloom"] = f"bloom-{number}.bin"
            self.bloom.save(self.folder / self._bloom_file)
        return state

    def close(self) -> None:
        for writer in self.writers.values():
            writer.abandon()


class CountSink:
    """Only counts what would be written (dry run)."""

    def __init__(self, sides: Iterable[str], state: dict[str, Any] | None) -> None:
        assert state is None, "a dry run is never resumed"
        self.report = StageReports()
        self.counts = {side: dict.fromkeys(COUNTED, 0) for side in sides}

    def write(self, result: Encoded) -> None:
        self.report.merge(result.report)
        for side, (tokens, lengths, rows) in result.sides.items():
            counts = (len(lengths), len(tokens), sum(rows["bytes"]), sum(rows["words"]))
            for kind, n in zip(COUNTED, counts, strict=True):
                self.counts[side][kind] += n

    def commit(self, number: int, done: bool) -> dict[str, Any]:
        return {"report": self.report.to_dict(), "counts": self.counts}

    def close(self) -> None:
        pass


def chunk_file(kind: str, chunk: Path) -> Path:
    return chunk.with_name(f"{kind}-{int(chunk.name):05d}.parquet")
