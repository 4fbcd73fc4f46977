"""One call of scripts/prepare_data.py: a complete preparation in this process, one stage of it, or all stages on an
executor.
"""

from __future__ import annotations

from lit_data.prepare.executors import run_on_executors
from lit_data.prepare.run import prepare, run_stage
from lit_data.prepare.settings import Execution, Settings


def carry_out(settings: Settings, execution: Execution) -> str:
    """Prepare data, run one stage, or submit to an executor. Returns a human-readable report, empty with an executor,
    whose tasks print theirs. Raises as `prepare`.
    """
    if execution.executor is not None:
        run_on_executors(settings, execution)
        return ""
    if execution.stage is None:
        return prepare(settings, execution).summary()
    report = run_stage(settings, execution)
    return report.summary() if report is not None else f"{execution.stage}: part {execution.part} is done"
