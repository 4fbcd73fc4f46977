"""Profiles a few steady steps: a Chrome trace, a table of where their time goes by kind of work, and a memory snapshot.

Every instant of the steps is counted once. On a CPU it belongs to the innermost operator that runs on the main thread;
on a GPU to the kernel that runs, and where several do (communication overlapped with computation) to one that is not
communication. The rest is idle. So the kinds add up to the steps' time.
"""

from __future__ import annotations

import contextlib
import gzip
import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lit_files.publish import write_json, write_text
from lit_files.run_files import PROFILE
from pretrain.args import ProfileArgs
from pretrain.logs.messages import warn

IDLE = "idle"
OTHER = "other"

# By the first pattern found in the name of an operator, a range (torch.profiler.record_function) or a GPU kernel.
OPERATORS: tuple[tuple[str, str], ...] = (
    ("optimizer", r"llammlein::optimizer|adamw|muon"),
    ("communication", r"nccl|gloo|c10d|all_reduce|all_gather|reduce_scatter|FSDP::"),
    ("teachers", r"llammlein::teachers"),
    ("loss", r"llammlein::loss|HeadLoss|cross_?entropy|nll_loss|log_softmax"),
    ("attention", r"attention|flash|fmha|varlen|_attn|llammlein::fa\d"),
    (
        "matmul",
        r"^aten::_?(mm|addmm|addmm_|bmm|baddbmm|grouped_mm|scaled_mm|mkldnn_linear)(\.|$)|^mkldnn::|expert_linear",
    ),
    ("norm", r"RMSNorm|rms_norm|LayerNorm|layer_norm|unit_norm"),
    ("copies and casts", r"llammlein::to_device|^aten::(copy_|_to_copy|to|clone|contiguous|cat|zero_|fill_)$|ToCopy"),
    (
        "elementwise",
        r"CompiledFx|Torch-Compiled|CompiledFunction|Rotate|^aten::(add|sub|mul|div|silu|gelu|sigmoid|tanh|relu|pow|square)|"
        r"(Silu|Gelu|Mul|Add|Tanh|Sigmoid)Backward",
    ),
)
KERNELS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention"),
    ("matmul", r"gemm|nvjet|cutlass|xmma|cublas|(^|_)mm_"),
    ("copies and casts", r"^Memcpy|^Memset"),
)
FUSED: tuple[tuple[str, str], ...] = (  # names of Inductor's kernels list the operators fused in them
    ("norm", r"^triton_.*(rsqrt|norm)"),
    ("copies and casts", r"^triton_poi_fused_(_?to_copy|copy_?|clone|view|cat|_)*\d*$"),
    ("elementwise", r"^triton_"),
)
# Everything that an operator of these kinds calls counts as that kind, including matrix multiplies and copies.
WHOLE = frozenset({"optimizer", "communication", "teachers", "attention"})
# These keep whatever they call except matrix multiplies.
SPECIFIC = frozenset({"loss", "norm"})
KINDS = ("matmul", "attention", "loss", "norm", "elementwise", "optimizer", "copies and casts", "teachers")
ALL_KINDS = (*KINDS, "communication", OTHER, IDLE)


def kind_by_name(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    """The kind of the first rule whose pattern is found in the name, in any case."""
    return next((kind for kind, pattern in rules if re.search(pattern, name, re.IGNORECASE)), None)


def kind_of_operator(name: str, parent: str) -> str:
    """The kind of an operator or range called by one of kind `parent`."""
    if parent in WHOLE:
        return parent
    kind = kind_by_name(name, OPERATORS)
    if parent in SPECIFIC and kind != "matmul" and kind not in WHOLE:
        return parent
    return kind or parent


def kind_of_kernel(name: str, operator: str) -> str:
    """The kind of a GPU kernel launched by an operator of kind `operator`."""
    kind = kind_by_name(name, KERNELS)
    if operator in WHOLE and kind != "communication":
        return operator
    if kind == "copies and casts" and operator in SPECIFIC:
        return operator
    if kind is not None:
        return kind
    if operator in (OTHER, "elementwise"):
        return kind_by_name(name, FUSED) or operator
    return operator


class Event(NamedTuple):
    """An operator, range or kernel of a trace, in microseconds."""

    start: float
    end: float
    name: str
    kind: str


@dataclass
class Breakdown:
    """Time by kind of work over several steps, in milliseconds a step."""

    device: str
    steps: int
    first_step: int
    milliseconds: dict[str, float]
    calls: dict[str, float]
    """Operators or kernels a step; of idle time on CUDA none."""
    largest: dict[str, list[tuple[str, float]]]
    """Per kind the names with the most time, and their milliseconds a step; likewise."""
    hidden_ms: float = 0.0
    """Communication while something else ran, not counted above."""
    total_ms: float = field(init=False)

    def __post_init__(self) -> None:
        self.total_ms = sum(self.milliseconds.values())

    def table(self) -> str:
        """Markdown."""
        last = self.first_step + self.steps - 1
        lines = [
            f"Steps {self.first_step} to {last} on {self.device}, {self.total_ms:.1f} ms each (slowed by the profiler)",
            "",
            "| kind | ms a step | share | calls | largest |",
            "|---|---:|---:|---:|---|",
        ]
        for kind in ALL_KINDS:
            if (ms := self.milliseconds.get(kind, 0.0)) > 0:
                largest = "; ".join(f"{name[:48]} {value:.1f}" for name, value in self.largest.get(kind, ())[:2])
                share = f"{ms / self.total_ms:.1%}"
                lines.append(f"| {kind} | {ms:.2f} | {share} | {self.calls.get(kind, 0):.0f} | {largest} |")
        if self.hidden_ms:
            lines += ["", f"Communication overlapped with other work, not counted: {self.hidden_ms:.2f} ms a step."]
        return "\n".join(lines)


def break_down(trace: dict[str, Any], device: str, first_step: int) -> Breakdown:
    """The time of a Chrome trace of torch.profiler with `ProfilerStep#N` ranges, by kind of work."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    ranges = [e for e in events if e["name"].startswith("ProfilerStep#") and e.get("cat") == "user_annotation"]
    start, end = min(e["ts"] for e in ranges), max(e["ts"] + e["dur"] for e in ranges)
    operators = nested(e for e in events if e.get("cat") in ("cpu_op", "user_annotation"))
    if device == "cuda":
        launched = {id_: kind for thread in operators.values() for _, kind, id_ in thread}
        kernels = [
            Event(
                e["ts"],
                e["ts"] + e["dur"],
                e["name"],
                kind_of_kernel(e["name"], launched.get(e["args"].get("External id"), OTHER)),
            )
            for e in events
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
        slices = device_slices(kernels)
    else:
        (thread,) = {e["tid"] for e in ranges}
        kernels = [event for event, _, _ in operators[thread]]
        slices = innermost_slices(kernels)
    return add_up(slices, kernels, start, end, device, len(ranges), first_step)


def nested(events: Iterable[dict[str, Any]]) -> dict[int, list[tuple[Event, str, int]]]:
    """The operators of each thread by start, with the kind that follows from name and callers, and their number."""
    threads: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    out: dict[int, list[tuple[Event, str, int]]] = {}
    for thread, of_thread in threads.items():
        callers: list[tuple[float, str]] = []  # (end, kind)
        found = out[thread] = []
        for e in sorted(of_thread, key=lambda e: (e["ts"], -e["dur"])):
            begin, end, name = e["ts"], e["ts"] + e["dur"], e["name"]
            while callers and callers[-1][0] <= begin:
                callers.pop()
            parent = callers[-1][1] if callers else OTHER
            kind = (
                IDLE
                if name.startswith("ProfilerStep#")
                else kind_of_operator(name, OTHER if parent == IDLE else parent)
            )
            callers.append((end, kind))
            found.append((Event(begin, end, name, kind), kind, e.get("args", {}).get("External id", -1)))
    return out


Slice = tuple[float, float, Event]
"""From, to, and the event that the time between belongs to."""


def innermost_slices(events: list[Event]) -> Iterator[Slice]:
    """Cut nested events, sorted by start, into slices that belong to the innermost one."""
    open_: list[Event] = []
    at = 0.0
    for event in [*events, None]:
        until = event.start if event is not None else float("inf")
        while open_ and open_[-1].end <= until:
            inner = open_.pop()
            if inner.end > at:
                yield at, inner.end, inner
                at = inner.end
        if event is not None:
            if open_ and event.start > at:
                yield at, event.start, open_[-1]
            at = max(at, event.start)
            open_.append(event)


def device_slices(kernels: list[Event]) -> Iterator[Slice]:
    """Cut kernels of several streams into slices that don't overlap; communication comes last."""
    bounds = sorted({t for k in kernels for t in (k.start, k.end)})
    waiting = sorted(kernels)
    running: list[tuple[bool, float, int, Event]] = []
    n = 0
    for begin, end in pairwise(bounds):
        while n < len(waiting) and waiting[n].start <= begin:
            event = waiting[n]
            heapq.heappush(running, (event.kind == "communication", event.start, n, event))
            n += 1
        while running and running[0][3].end <= begin:
            heapq.heappop(running)
        if running:
            yield begin, end, running[0][3]


def add_up(
    slices: Iterable[Slice], events: list[Event], start: float, end: float, device: str, steps: int, first_step: int
) -> Breakdown:
    """Sum the slices between `start` and `end` (microseconds); time without one is idle."""
    by_kind: Counter[str] = Counter()
    by_name: dict[str, Counter[str]] = defaultdict(Counter)
    for begin, until, event in slices:
        us = min(until, end) - max(begin, start)
        if us > 0:
            by_kind[event.kind] += us  # type: ignore[assignment]
            by_name[event.kind][event.name] += us  # type: ignore[assignment]
    by_kind[IDLE] += end - start - sum(by_kind.values())  # type: ignore[assignment]
    inside = [e for e in events if start <= e.start < end]
    calls = Counter(e.kind for e in inside)
    in_all = sum(e.end - e.start for e in inside if e.kind == "communication") if device == "cuda" else 0.0
    scale = 1e-3 / steps
    return Breakdown(
        device,
        steps,
        first_step,
        {kind: us * scale for kind, us in by_kind.items()},
        {kind: n / steps for kind, n in calls.items()},
        {kind: [(name, us * scale) for name, us in names.most_common(5)] for kind, names in by_name.items()},
        max(0.0, in_all - by_kind["communication"]) * scale,
    )


class StepProfiler:
    """Profiles `args.steps` steps of this process, after `args.start` others, on rank 0.

    Call `after_step` at the end of each step: a step lasts from one call to the next, with all that a step waits for.
    """

    def __init__(self, args: ProfileArgs, folder: Path, device: torch.device) -> None:
        self.args, self.folder, self.device = args, folder / PROFILE, device
        self._count = 0
        self._profiler: profile | None = None
        self._first_step = 0
        self._report: str | None = None

    def after_step(self, step: int) -> str | None:
        """Count a step, `step` being the steps done by the run. Returns the table after the last profiled one."""
        self._count += 1
        if self._count == self.args.start:  # the next step warms the profiler up
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=1, active=self.args.steps, repeat=1),
                on_trace_ready=self._finish,
                acc_events=True,
            )
            self._profiler.start()
        elif self._profiler is not None:
            if self._count == self.args.start + 1:
                self._first_step = step + 1
                self._begin()
            last = self._count == self.args.needed_steps
            if last and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._profiler.step()
            if last:
                self.close()
                return self._report
        return None

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    def _finish(self, finished: profile) -> None:
        if self._count != self.args.needed_steps:
            return  # closed before the last step
        name = f"steps-{self._first_step:08d}"
        try:
            self.folder.mkdir(exist_ok=True)
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}-memory.pickle"))
            trace = self.folder / f"{name}.trace.json.gz"
            finished.export_chrome_trace(str(trace))
            with gzip.open(trace) as file:
                result = break_down(json.load(file), self.device.type, self._first_step)
            write_json(self.folder / f"{name}.json", vars(result))
            write_text(self.folder / f"{name}.md", result.table() + "\n")
        except OSError as error:
            warn(f"the profile could not be written to {self.folder}: {error}")
        else:
            self._report = f"{result.table()}\nprofile in {self.folder}"

    def close(self) -> None:
        """Stop profiling. A profile that is not complete is dropped."""
        if self._profiler is not None:
            with contextlib.suppress(RuntimeError):
                self._profiler.stop()
            self._profiler = None
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
