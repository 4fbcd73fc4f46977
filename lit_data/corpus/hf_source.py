"""Reads documents from Hugging Face datasets: `hf:NAME[@CONFIG][:SPLIT]`, streamed through `datasets`.

NAME is a name on the Hub, or a folder if it starts with `.` or `/` (with data files, or written by `save_to_disk`).
Without CONFIG the dataset must have only one; SPLIT defaults to `train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "hf:"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset, by name."""

    name: str
    config: str | None
    split: str

    @property
    def spec(self) -> str:
        """The form used on the command line."""
        return f"{PREFIX}{self.name}{f'@{self.config}' if self.config else ''}:{self.split}"

    @property
    def is_local(self) -> bool:
        return self.name.startswith((".", "/"))

    def shards(self) -> list[HubShard]:
        """Its independently readable shards; for data files, one per file. Queries the Hub.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: it can't be opened (no such dataset, configuration or split), or `datasets` is missing.
        """
        n_shards = int(self.open().num_shards)
        return [HubShard(self, number, n_shards) for number in range(n_shards)]

    def open(self) -> Any:
        """An IterableDataset."""
        try:
            import datasets  # imported here: optional, and slow to import
        except ImportError as error:
            raise ValueError(
                f"{self.spec} is read with the package datasets; install it: pip install 'llammlein[data]'"
            ) from error
        if self.is_local and not Path(self.name).is_dir():
            raise FileNotFoundError(f"{self.spec} cannot be opened: {self.name} is not a folder")
        try:
            if self.is_local and _was_saved_to_disk(Path(self.name)):
                return self._open_saved(datasets)
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # many types, as in `HubShard.rows`
            raise ValueError(f"{self.spec} cannot be opened: {_one_line(error)}") from error

    def _open_saved(self, datasets: Any) -> Any:
        saved = datasets.load_from_disk(self.name)
        if isinstance(saved, datasets.DatasetDict):
            if self.split not in saved:
                raise ValueError(f"it has no split {self.split!r}; its splits are {', '.join(saved)}")
            saved = saved[self.split]
        return saved.to_iterable_dataset()


@dataclass(frozen=True)
class HubShard:
    """The `number`-th (0-based) of `n_shards` shards of a dataset."""

    dataset: HubDataset
    number: int
    n_shards: int

    @property
    def name(self) -> str:
        """The dataset's name, with `#NUMBER` if there are several shards."""
        return self.dataset.spec + (f"#{self.number}" if self.n_shards > 1 else "")

    def rows(self, start: int, columns: Sequence[str], optional: str) -> Iterator[dict[str, Any]]:
        """Iterate over its rows from the `start`-th (0-based).

        Args:
            columns: required; `optional` ones may be missing. Others are not read if possible. For `translation.de` it
                is `translation`.

        Raises:
            ValueError: while iterating: the dataset's number of shards has changed, a column is missing, or the source
                can't be read.
        """
        stream = self.dataset.open()
        if stream.num_shards != self.n_shards:
            raise ValueError(
                f"{self.dataset.spec} has {stream.num_shards} shards instead of {self.n_shards}: the dataset has "
                "changed; start again with --fresh"
            )
        row = start
        try:
            stream = stream.shard(self.n_shards, self.number)
            if start:
                stream = stream.skip(start)
            if stream.column_names is not None:
                self._check_columns(stream.column_names, columns)
                wanted = dict.fromkeys(_top_level(c, stream.column_names) for c in (*columns, optional))
                stream = stream.select_columns([c for c in wanted if c in stream.column_names])
            for row, record in enumerate(stream, start + 1):
                if row == start + 1:
                    self._check_columns(list(record), columns)
                yield record
        except _MissingColumnError:
            raise
        except Exception as error:  # errors of `datasets`, Arrow, the file system and the network: many types
            raise ValueError(f"{self.name} cannot be read after row {row}: {_one_line(error)}") from error

    def _check_columns(self, names: Sequence[str], columns: Sequence[str]) -> None:
        for column in columns:
            if _top_level(column, names) not in names:
                raise _MissingColumnError(f"{self.name} has no column {column!r}; its columns are {', '.join(names)}")


def _top_level(column: str, names: Sequence[str]) -> str:
    """The column of a field: `translation` for `translation.de`."""
    return column if column in names else column.partition(".")[0]


class _MissingColumnError(ValueError):
    """A user's mistake, unlike an unreadable source."""


def parse_hub_dataset(spec: str) -> HubDataset | None:
    """Parse `hf:NAME[@CONFIG][:SPLIT]`; None for anything that does not start with `hf:`."""
    if not spec.startswith(PREFIX):
        return None
    name, _, split = spec.removeprefix(PREFIX).partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise ValueError(f"{spec} names no dataset; write hf:NAME[@CONFIG][:SPLIT]")
    if "[" in split:
        raise ValueError(f"{spec}: a part of a split cannot be streamed; give the whole split")
    return HubDataset(name, config or None, split or "train")


def _was_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
