"""Pytest options, and the packed dataset shared by the training tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from running import write_dataset

# --hypothesis-profile=many; tests/model/test_many_examples.py runs with it.
settings.register_profile("many", max_examples=300)


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
