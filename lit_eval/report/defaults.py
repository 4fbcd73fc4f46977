"""Defaults of scripts/report.py."""

from __future__ import annotations

FILE = "report.html"  # in the run folder
RECORD_S = 4.0  # for reading the record
