"""Formats numbers for readers: a few significant digits, k/M/B for counts, axis ticks at round values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import overload

MISSING = "–"
YEAR_S = 365 * 86400
SCALES = ((1e12, "trillions", "T"), (1e9, "billions", "B"), (1e6, "millions", "M"), (1e3, "thousands", "k"))


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits; – if there is none, also for NaN."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value
    if size < -4 or size >= 9:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def loss(value: float | None) -> str:
    """A loss or bits per byte: four decimals."""
    return number(value) if value is None or not 1e-3 < abs(value) < 1e4 else f"{value:.4f}"


@overload
def perplexity(loss_nats: float) -> float: ...
@overload
def perplexity(loss_nats: None) -> None: ...
def perplexity(loss_nats: float | None) -> float | None:
    """exp of a loss; infinite where it overflows."""
    if loss_nats is None:
        return None
    return math.inf if loss_nats >= 700 else math.exp(loss_nats)


def whole(value: float | None) -> str:
    """A count with thousands separated: 1,024,000."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def short(value: float | None, digits: int = 3) -> str:
    """A count by its scale, from 10,000 on: 9,500, 1.02 M."""
    if value is None or not math.isfinite(value):
        return number(value)
    if abs(value) < 1e4:
        return number(value, digits) if value != round(value) else f"{value:,.0f}"
    for scale, _, letter in SCALES:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{number(value / scale, digits)} {letter}"
    raise AssertionError


def percent(share: float | None) -> str:
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min 5 s`, `2 h 13 min`, `3 d 4 h`, `2 y 17 d`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    units = (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600), ("y", "d", YEAR_S, 86400))
    large, small, size, part = next((u for u, above in pairwise(units) if seconds < above[2]), units[-1])
    big, rest = divmod(round(seconds / part), size // part)
    return f"{big:,} {large} {rest} {small}" if rest else f"{big:,} {large}"


def scale_of(largest: float) -> tuple[float, str, str]:
    """(divisor, word, letter) to show counts up to `largest`: (1e6, "millions", "M"); (1, "", "") for small ones."""
    return next((scale for scale in SCALES if largest >= scale[0]), (1.0, "", ""))


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values inside [low, high], 1, 2 or 5 times a power of ten apart, about `most` of them."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = min((f * power for f in (1, 2, 5, 10)), key=lambda s: abs(math.log((high - low) / s / most)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten inside [low, high], every n-th if they are too many; also 2 and 5 times them if they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**p for p in range(first, last + 1, every) for f in factors]
        inside = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside
    return linear_ticks(low, high, most)


def brief(value: float) -> str:
    """A tick of a logarithmic axis, a few digits at most: 0.003, 20, 500k."""
    divisor, _, letter = next((s for s in SCALES if value >= s[0]), (1.0, "", ""))
    return f"{value / divisor:.3g}{letter}" if value >= 1e-4 else number(value, 2)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with as many decimals as tell the ticks apart."""
    if not ticks:
        return []
    if len(ticks) > 1 and min(ticks) > 0 and max(ticks) / min(ticks) >= 100:
        return [brief(t) for t in ticks]
    steps = [abs(b - a) for a, b in pairwise(ticks) if a != b]
    step = min(steps, default=abs(ticks[0]) or 1.0)
    largest = max(map(abs, ticks))
    if largest < 1e-3 and largest > 0:
        exponent = math.floor(math.log10(largest))
        digits = max(0, exponent - math.floor(math.log10(step) + 1e-9))
        return ["0" if t == 0 else f"{t / 10**exponent:.{digits}f}e{exponent}".replace("-", "−") for t in ticks]
    divisor, _, letter = scale_of(largest / 5) if largest >= 1e4 else (1.0, "", "")
    decimals = max(0, -math.floor(math.log10(step / divisor) + 1e-9))
    return [f"{t / divisor:,.{decimals}f}{letter}".replace("-", "−") if t else "0" for t in ticks]
