"""Provenance recorded with every benchmark result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any


def provenance(command: str, *packages: str, processor: str | None = None) -> dict[str, Any]:
    """Date, command line, machine (by default the CPU's kind) and versions of these packages, for a JSON."""
    machine = processor or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
