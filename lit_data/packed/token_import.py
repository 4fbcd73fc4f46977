"""Imports other programs' token files as a packed dataset; Megatron files are hard-linked if their layout already fits.
The folder is built under a temporary name and renamed when complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.corpus.files import ReadErrors
from lit_data.packed.import_settings import ImportSettings
from lit_data.packed.index import MAX_DOCUMENT_TOKENS, IntArray, dtype_of, write_index
from lit_data.packed.manifest import DOCUMENT_COLUMNS, FORMAT_VERSION, MANIFEST, Manifest, Shard
from lit_data.packed.token_files import (
    Block,
    MegatronIndex,
    TokenFile,
    Tokens,
    datatrove_blocks,
    find_token_files,
    fixed_blocks,
    megatron_blocks,
    split_blocks,
)
from lit_data.packed.writer import DOCUMENTS_PER_GROUP, PackedWriter, remove_rows
from lit_data.tokenizers.files import save_tokenizer
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_files.checksum import file_sha256
from lit_files.progress import track
from lit_files.publish import build_folder, link_or_copy, write_json

MAX_VOCAB_SIZE = 2**31 - 1


@dataclass
class ImportReport:
    """The report of an import. `linked` counts shards whose tokens are the source's own file."""

    output: Path
    documents: int = 0
    tokens: int = 0
    shards: int = 0
    linked: int = 0
    appended_eos: int = 0
    empty_documents: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """A human-readable summary of several lines."""
        lines = [f"wrote {self.output}: {self.documents:,} documents, {self.tokens:,} tokens, {self.shards} shards"]
        if self.linked:
            lines.append(f"  the tokens of {self.linked} shards are links to the source's files: don't change these")
        lines.append(f"  EOS appended to {self.appended_eos:,} documents; {self.empty_documents:,} empty ones left out")
        lines.append(f"  {self.seconds:.1f} s")
        return "\n".join(lines)


def import_tokens(settings: ImportSettings) -> ImportReport:
    """Import token files as a packed dataset, all or nothing.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: any other mistake; the message names it.
    """
    began = time.monotonic()
    output = Path(os.path.abspath(settings.output))
    if os.path.lexists(output):
        raise ValueError(f"--output {output} exists already; choose another folder or remove it")
    target = _target(settings)
    errors = ReadErrors()
    files = find_token_files(settings.input, settings.dtype, errors)
    _check_cutting(settings, files)
    errors.print_warnings()
    source = {"imported": [str(f.path) for f in files], "kinds": sorted({f.kind for f in files})}
    importer = _Importer(files, target, settings, ImportReport(output))

    with build_folder(output) as temporary:
        if all(f.kind == "megatron" and importer.fits(f) for f in files):
            manifest = importer.link(temporary, source)
        else:
            manifest = importer.convert(temporary, output, source)
        if target.tokenizer is not None:
            save_tokenizer(target.tokenizer, temporary / "tokenizer")
    report = importer.report
    report.documents, report.tokens, report.shards = manifest.documents, manifest.tokens, len(manifest.shards)
    report.seconds = time.monotonic() - began
    return report


def _check_cutting(settings: ImportSettings, files: Sequence[TokenFile]) -> None:
    indexed = [f for f in files if f.has_index]
    flag = "--split_at" if settings.split_at is not None else "--document_tokens"
    cut = settings.split_at is not None or settings.document_tokens is not None
    if indexed and cut and len(indexed) == len(files):
        raise ValueError(f"{flag}: {indexed[0].path} has an index of its documents; leave {flag} out")
    if indexed and settings.across_files:
        raise ValueError(f"--across_files: {indexed[0].path} has an index of its documents; leave --across_files out")


@dataclass(frozen=True)
class _Target:
    """The vocabulary of the ids: size, EOS, BOS, tokenizer facts."""

    vocab_size: int
    eos_id: int
    facts: dict[str, Any]
    tokenizer: Tokenizer | None
    bos_id: int | None = None


def _target(settings: ImportSettings) -> _Target:
    vocab_size, eos_id = settings.vocab_size, settings.eos_id
    if settings.bos and settings.tokenizer is None:
        raise ValueError("--bos needs --tokenizer, which defines the BOS token")
    if settings.tokenizer is not None:
        if vocab_size is not None or eos_id is not None:
            raise ValueError("--tokenizer already defines the vocabulary and EOS; leave out --vocab_size and --eos_id")
        tokenizer = open_tokenizer(settings.tokenizer, settings.eos_token)
        facts = {**tokenizer.facts(), "folder": "tokenizer"}
        bos_id = tokenizer.need_bos() if settings.bos else None
        return _Target(tokenizer.vocab_size, tokenizer.eos_id, facts, tokenizer, bos_id)
    if vocab_size is None or eos_id is None:
        raise ValueError("give --tokenizer, or --vocab_size and --eos_id: the ids are checked against the vocabulary")
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"--vocab_size {vocab_size} is too large: ids have 31 bits, so give at most {MAX_VOCAB_SIZE}")
    if vocab_size < 1 or not 0 <= eos_id < vocab_size:
        raise ValueError(f"--eos_id {eos_id} is outside a vocabulary of --vocab_size {vocab_size}")
    # Nothing else is known; datasets imported with the same values count as the same tokenizer.
    fingerprint = hashlib.sha256(f"unknown tokenizer {vocab_size} {eos_id}".encode()).hexdigest()
    facts = {"kind": "unknown", "fingerprint": fingerprint, "vocab_size": vocab_size, "eos_id": eos_id, "folder": None}
    return _Target(vocab_size, eos_id, facts, None)


@dataclass(frozen=True)
class _Importer:
    files: list[TokenFile]
    target: _Target
    settings: ImportSettings
    report: ImportReport

    def blocks(self) -> Iterator[Block]:
        """Iterate over the documents of all files in order; empty ones are counted and skipped."""
        for block, separator in self._all_blocks():
            kept = block.lengths > 0
            if separator is not None:
                last = block.tokens[np.maximum(np.cumsum(block.lengths), 1) - 1]
                kept &= (block.lengths > 1) | (last != separator)
            yield from self._only(block, kept)

    def _only(self, block: Block, kept: npt.NDArray[np.bool_]) -> Iterator[Block]:
        self.report.empty_documents += len(kept) - int(kept.sum())
        if kept.any():
            yield block.only(kept)

    def _all_blocks(self) -> Iterator[tuple[Block, int | None]]:
        """Iterate over blocks, with the separator if documents contain it."""
        split_at, across = self.settings.split_at, self.settings.across_files
        for files in [self.files] if across else [[file] for file in self.files]:
            if files[0].kind == "megatron":
                yield from ((block, None) for block in megatron_blocks(files[0]))
            elif files[0].kind == "datatrove":
                yield from ((block, None) for block in datatrove_blocks(files[0]))
            elif split_at is not None:
                keep = split_at == self.target.eos_id
                for block in split_blocks(files, split_at, keep, across):
                    yield block, split_at if keep else None
            else:
                yield from ((block, None) for block in fixed_blocks(files[0], self.settings.document_tokens))

    def convert(self, temporary: Path, output: Path, source: dict[str, Any]) -> Manifest:
        """Rewrite the documents."""
        writer = PackedWriter(
            output,
            tokenizer=self.target.facts,
            vocab_size=self.target.vocab_size,
            eos_id=self.target.eos_id,
            shard_tokens=self.settings.shard_tokens,
            source=source,
            work=temporary,
            bos_id=self.target.bos_id,
        )
        try:
            total = sum(file.tokens for file in self.files)
            for block in track(self.blocks(), "importing", "tokens", total, size=lambda block: len(block.tokens)):
                tokens, lengths = self._ended(block)
                writer.add_batch(tokens, lengths, _rows(block.file, block.numbers))
            manifest = writer.finish()
            remove_rows(temporary)
            return manifest
        finally:
            writer.abandon()

    def _ended(self, block: Block) -> tuple[Tokens, IntArray]:
        """The block with EOS after each document that lacks it."""
        ends = np.cumsum(block.lengths)
        open_ones = np.flatnonzero(block.tokens[ends - 1] != self.target.eos_id)
        if not len(open_ones):
            return block.tokens, block.lengths
        if not self.settings.append_eos:
            raise ValueError(
                f"{block.file.path}: document {block.numbers[open_ones[0]] + 1} does not end with the id "
                f"{self.target.eos_id} of EOS; give --append_eos to append it where it is missing"
            )
        self.report.appended_eos += len(open_ones)
        lengths = block.lengths.copy()
        lengths[open_ones] += 1
        wide = np.promote_types(block.tokens.dtype, dtype_of(self.target.vocab_size))  # EOS may exceed the source's
        return np.insert(block.tokens.astype(wide, copy=False), ends[open_ones], self.target.eos_id), lengths

    def fits(self, file: TokenFile) -> bool:
        """Whether a Megatron file can be linked: contiguous documents, each ending in EOS, of our dtype."""
        index = MegatronIndex(file.path.with_suffix(".idx"))
        if file.dtype != dtype_of(self.target.vocab_size) or index.end_byte != file.path.stat().st_size:
            return False
        if not index.end_byte or not index.is_plain():
            return False
        for block in megatron_blocks(file):
            ends = np.cumsum(block.lengths)[block.lengths > 0]
            if block.lengths.max() > MAX_DOCUMENT_TOKENS or (block.tokens[ends - 1] != self.target.eos_id).any():
                return False
        return True

    def link(self, temporary: Path, source: dict[str, Any]) -> Manifest:
        """Link or copy the tokens and write their companion files: one shard per file."""
        total = sum(file.tokens for file in self.files)
        files = track(self.files, "importing", "tokens", total, size=lambda file: file.tokens)
        shards = [self._link_shard(file, temporary, f"data-{n:05d}") for n, file in enumerate(files)]
        manifest = Manifest(
            FORMAT_VERSION,
            self.target.facts,
            self.target.vocab_size,
            self.target.eos_id,
            dtype_of(self.target.vocab_size).name,
            sum(s.documents for s in shards),
            sum(s.tokens for s in shards),
            0,
            shards,
            source,
            self.target.bos_id,
        )
        write_json(temporary / MANIFEST, manifest.to_dict())
        return manifest

    def _link_shard(self, file: TokenFile, folder: Path, name: str) -> Shard:
        paths = {kind: folder / f"{name}.{kind}" for kind in ("bin", "idx", "docs.parquet")}
        if self.settings.copy:
            shutil.copyfile(file.path, paths["bin"])
        else:
            self.report.linked += link_or_copy(file.path, paths["bin"])
        digest, all_lengths = hashlib.sha256(), []
        with pq.ParquetWriter(paths["docs.parquet"], _SCHEMA, compression="zstd") as docs:
            for block in (b for found in megatron_blocks(file) for b in self._only(found, found.lengths > 0)):
                self._check(block)
                digest.update(np.ascontiguousarray(block.tokens).data.cast("B"))
                all_lengths.append(block.lengths.astype(np.int32))
                docs.write_table(pa.table(_rows(file, block.numbers), _SCHEMA), row_group_size=DOCUMENTS_PER_GROUP)
        lengths = np.concatenate(all_lengths)
        write_index(paths["idx"], lengths, file.dtype)
        sums = {k: digest.hexdigest() if k == "bin" else file_sha256(path) for k, path in paths.items()}
        sizes = {k: path.stat().st_size for k, path in paths.items()}
        return Shard(name, len(lengths), int(lengths.sum(dtype=np.int64)), 0, sizes, sums)

    def _check(self, block: Block) -> None:
        if block.tokens.min() < 0 or block.tokens.max() >= self.target.vocab_size:
            bad = int(np.flatnonzero((block.tokens < 0) | (block.tokens >= self.target.vocab_size))[0])
            number = block.numbers[np.searchsorted(np.cumsum(block.lengths), bad, side="right")]
            raise ValueError(
                f"{block.file.path}: document {number + 1} holds token id {block.tokens[bad]}, outside the vocabulary "
                f"of {self.target.vocab_size}; check that the tokenizer is the one the ids were made with"
            )
        if self.target.bos_id is not None:
            unbegun = np.flatnonzero(block.tokens[np.cumsum(block.lengths) - block.lengths] != self.target.bos_id)
            if len(unbegun):
                raise ValueError(
                    f"{block.file.path}: document {block.numbers[unbegun[0]] + 1} does not begin with the id "
                    f"{self.target.bos_id} of BOS; leave out --bos if documents begin with their text"
                )


_SCHEMA = pa.schema(DOCUMENT_COLUMNS)


def _rows(file: TokenFile, numbers: IntArray) -> dict[str, list[Any]]:
    """Columns of docs.parquet. A document's place is its 1-based number in its file; its text is unknown."""
    places = (numbers + 1).tolist()
    return {
        "id": [f"{file.name}:{place}" for place in places],
        "source": [str(file.path)] * len(places),
        "place": places,
        "bytes": [0] * len(places),
        "words": [None] * len(places),
    }
