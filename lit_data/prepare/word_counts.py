"""Adds word counts to a dataset without them (from an earlier version, or imported tokens).

The new files are built in `.words` in the dataset's folder, manifest.json last; then each replaces the old one. The
next call completes one that was killed; between two replacements the dataset opens as one without word counts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.packed.manifest import FORMAT_VERSION, MANIFEST, WORDS_WORK, Shard, read_manifest, sum_of_words
from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import tokenizer_of
from lit_data.packed.writer import add_words
from lit_data.prepare.filters import count_words
from lit_data.prepare.pool import Pool
from lit_files.checksum import file_sha256
from lit_files.lock import FileLock, lock_folder
from lit_files.progress import track
from lit_files.publish import publish, replace_file, write_json


def add_word_counts(folder: str | Path, tokenizer_path: str | Path | None = None, workers: int = 1) -> int:
    """Count the words of each document and store them in docs.parquet and the manifest. Returns their sum.

    Args:
        folder: the dataset; nothing is done if its words are already counted.
        tokenizer_path: default: the one stored with the dataset.
        workers: number of processes; each handles one shard at a time.

    Raises:
        FileNotFoundError, ValueError: no dataset, no tokenizer, or not the one that encoded the tokens.
    """
    folder = Path(os.path.realpath(folder))
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    manifest, work = read_manifest(folder), folder / WORDS_WORK
    if manifest.words is not None and not work.exists():
        return manifest.words
    lock = lock_folder(work, "wait for it or end it")
    try:
        if (work / MANIFEST).is_file():
            return _replace(folder, work, lock)
        if manifest.words is not None:  # everything was replaced; only the empty folder is left
            lock.remove_folder()
            return manifest.words
        try:
            _work_out(folder, work, tokenizer_path, workers)
        except BaseException:
            lock.remove_folder(ignore_errors=True)
            raise
        return _replace(folder, work, lock)
    finally:
        lock.close()


def _work_out(folder: Path, work: Path, tokenizer_path: str | Path | None, workers: int) -> None:
    dataset = PackedDataset(folder)
    tokenizer = tokenizer_of(dataset, tokenizer_path)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer beside it to decode its tokens with: give one with --tokenizer")
    manifest = dataset.manifest
    make = functools.partial(_Counter, folder, work, str(tokenizer.path), tokenizer.eos_token)
    with Pool(min(workers, max(1, len(manifest.shards))), make) as pool:
        results = pool.map("count", range(len(manifest.shards)))
        shards = list(track(results, "counting words", "shards", len(manifest.shards)))
    counted = dataclasses.replace(
        manifest,
        format_version=FORMAT_VERSION,
        shards=shards,
        words=sum_of_words(shards),
        source={**manifest.source, "words": "counted in the decoded text"},
    )
    write_json(work / MANIFEST, counted.to_dict())


def _replace(folder: Path, work: Path, lock: FileLock) -> int:
    """Replace the old files by the finished ones, the manifest last."""
    manifest = read_manifest(work)
    for path in sorted(work.glob("*.docs.parquet")):
        publish(path, folder / path.name)
    publish(work / MANIFEST, folder / MANIFEST)
    lock.remove_folder()
    assert manifest.words is not None
    return manifest.words


class _Counter:
    """Counts the words of shards; built once in each worker."""

    def __init__(self, folder: Path, work: Path, tokenizer: str, eos_token: str) -> None:
        self.folder, self.work, self.dataset = folder, work, PackedDataset(folder)
        opened = tokenizer_of(self.dataset, tokenizer, eos_token)
        assert opened is not None
        self.tokenizer = opened

    def count(self, number: int) -> Shard:
        """Write a shard's docs.parquet with words; returns its entry for the manifest."""
        shards = self.dataset.manifest.shards
        shard, document = shards[number], sum(s.documents for s in shards[:number])
        name, words = f"{shard.name}.docs.parquet", 0
        with pq.ParquetFile(self.folder / name) as old, replace_file(self.work / name) as temporary:
            schema = _with_words(old.schema_arrow, self.folder / name)
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for group in range(old.num_row_groups):
                    rows = old.read_row_group(group)
                    column = pa.array(self._words(document, rows.num_rows), pa.int64())
                    columns = [column if f.name == "words" else rows[f.name] for f in schema]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                    document += rows.num_rows
                    words = add_words(words, column) or 0
        path = self.work / name
        sizes = {**shard.sizes, "docs.parquet": path.stat().st_size}
        sums = {**shard.sha256, "docs.parquet": file_sha256(path)}
        return dataclasses.replace(shard, sizes=sizes, sha256=sums, words=words)

    def _words(self, first: int, count: int) -> list[int]:
        """Words of `count` documents from number `first` on; BOS and EOS are not part of the text."""
        starts = self.dataset.document_start(np.arange(first, first + count + 1, dtype=np.int64)).tolist()
        begin = 0 if self.dataset.manifest.bos_id is None else 1
        found = []
        for start, stop in itertools.pairwise(starts):
            ids = self.dataset.tokens(start, stop)[begin:-1]
            found.append(count_words(self.tokenizer.decode(ids)))
        return found


def _with_words(schema: pa.Schema, path: Path) -> pa.Schema:
    """The schema with a column `words` after `bytes`. Raises ValueError if the user's metadata has that name."""
    at = schema.get_field_index("words")
    if at < 0:
        return schema.insert(schema.get_field_index("bytes") + 1, pa.field("words", pa.int64()))
    if schema.field(at).type != pa.int64():
        raise ValueError(
            f"{path} has a metadata column named words: prepare the dataset again with another name for it"
        )
    return schema
