"""What a dataset holds of one document."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset


def facts_of(dataset: PackedDataset, number: int) -> dict[str, Any]:
    """The row of docs.parquet, with the document's `number`, and its `start` and `tokens` in the stream."""
    facts = Documents(dataset).facts([number])[number]
    start, stop = dataset.document_start(np.asarray([number, number + 1], dtype=np.int64)).tolist()
    return {"number": number, **facts, "start": start, "tokens": stop - start}
