"""Worker process: reads rows of a dataset through a cache and checks each against the dataset itself.

    PYTHONPATH=ROOT python cache_worker.py PLAN

PLAN is JSON: data, folder, budget and chunk in bytes, rows (first tokens), row_tokens, and the other keys `main` reads.

Prints "ready" when the cache is open, and its counters as JSON at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from lit_data.loading.shard_cache import ShardCache, ShardFiles
from lit_data.packed.reader import PackedDataset


class SlowSource(ShardFiles):
    """Sleeps in each read of the staging thread."""

    seconds = 0.0
    reads_before_sleep = 0

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        data = super().pread(shard, offset, size)
        if self.seconds and size > 4096:
            self.reads_before_sleep -= 1
            if self.reads_before_sleep < 0:
                time.sleep(self.seconds)
        return data


def main(plan: dict) -> None:
    data = PackedDataset(plan["data"])
    source = SlowSource(data)
    source.seconds, source.reads_before_sleep = plan.get("sleep", 0.0), plan.get("reads_before_sleep", 0)
    cache = ShardCache(data, plan["folder"], plan["budget"], chunk_bytes=plan["chunk"], source=source)
    starts = np.asarray(plan["rows"], dtype=np.int64)
    stops = np.minimum(starts + plan["row_tokens"], data.n_tokens)
    print("ready", flush=True)
    cache.follow(iter([(starts, stops)]))
    if plan.get("wait_until_staged"):
        while cache.staged_rows < len(starts):
            time.sleep(0.005)
    out = np.empty(plan["row_tokens"], dtype=np.int64)
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        row = out[: stop - start]
        row.fill(-1)
        cache.copy_tokens(row, start, stop)
        assert np.array_equal(row, data.tokens(start, stop)), (os.getpid(), i)
        cache.used(i + 1)
        time.sleep(plan.get("row_seconds", 0.0))
    cache.close()
    counters = {"hits": cache.hits, "misses": cache.misses, "staged": cache.staged_bytes, "failure": cache.failure}
    print(json.dumps(counters), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
