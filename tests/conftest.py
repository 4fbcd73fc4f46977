"""Pytest options, the category of each test, and the packed dataset shared by the training tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from running import write_dataset

# --hypothesis-profile=many; tests/model/test_many_examples.py runs with it.
settings.register_profile("many", max_examples=300)


# A test has one category, by its folder or the name of its file: the first of these that matches.
CATEGORIES = {
    "performance": re.compile(r"benchmarks_run|start_up|host_sync|memory_fit|many_shards|profile|recomputation|_cost"),
    "edge": re.compile(
        r"/chaos/|bad_input|damage|fault|fuzz|malicious|interrupt|failure|rank_errors|_lock|watchdog|resume_anyway"
    ),
    "unit": re.compile(r"tests/(model|data|files|harness)/|tests/test_"),
    "integration": re.compile(""),
}
NOT_BY_DEFAULT = "slow", "chaos", "gpu", "smoke"  # an expression of -m without these leaves slow and chaos tests out
SMOKE = re.compile(r"test_smoke|test_loss\.|test_order\.|test_packed\.")
"""Files of `make smoke`, which takes less than a minute."""


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.option.markexpr
    if chosen and not any(word in chosen for word in NOT_BY_DEFAULT):
        config.option.markexpr = f"({chosen}) and not slow and not chaos"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Read only the files of `-m smoke`. On Windows always: the other tests fork, lock and watch files as POSIX can."""
    smoke = config.option.markexpr == "smoke" or sys.platform == "win32"
    return True if smoke and collection_path.suffix == ".py" and not SMOKE.search(collection_path.name) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(item.config.rootpath).as_posix()
        item.add_marker(next(name for name, pattern in CATEGORIES.items() if pattern.search(file)))
        if SMOKE.search(file) and item.get_closest_marker("slow") is None:
            item.add_marker("smoke")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="of the kills only every N-th (tests/chaos)")
    parser.addoption("--write_golden", metavar="FILE", help="write the golden numbers of this machine (tests/golden)")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train (about 4000 tokens, documents of 1 to 90 tokens) and DIR/val."""
    folder = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(7)
    write_dataset(folder / "train", rng.integers(1, 90, size=90).tolist())
    write_dataset(folder / "val", rng.integers(1, 90, size=9).tolist(), seed=1)
    return folder
