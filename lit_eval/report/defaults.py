"""Defaults of scripts/report.py."""

from __future__ import annotations

RECORD_S = 4.0  # for reading the record
