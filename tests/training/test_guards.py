"""Spike detection as a function of losses, and what ranks agree on; without a run."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from written_runs import write_run

from pretrain.args import GuardArgs
from pretrain.endings import AgreedError
from pretrain.guards import SpikeDetector, StopRequest, check_progress
from pretrain.stop_signals import StopSignals
from pretrain.train import warn_if_nothing_was_learned


def losses(n: int, seed: int = 0) -> list[float]:
    """A falling loss with noise."""
    rng = np.random.default_rng(seed)
    return (3 + 4 * np.exp(-np.arange(n) / 200) + rng.normal(0, 0.05, n)).tolist()


def spikes(values: list[float], args: GuardArgs) -> list[tuple[int, int, int]]:
    detector = SpikeDetector(args)
    found = [detector.add(10 * (i + 1), v) for i, v in enumerate(values)]
    return [(s.good_step, s.first_step, s.step) for s in found if s is not None]


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(s, marks=pytest.mark.slow) for s in range(5, 20))])
def test_no_alarm_without_a_spike(seed: int) -> None:
    assert spikes(losses(2000, seed), GuardArgs()) == []


@pytest.mark.parametrize("height", [1.0, 50.0, math.inf, math.nan])
def test_a_spike_is_found_at_its_start(height: float) -> None:
    values = losses(500)
    for i in range(300, 310):
        values[i] += height
    assert spikes(values, GuardArgs(spike_rows=3))[0] == (3000, 3010, 3030)


def test_single_high_losses_are_no_spike_and_do_not_raise_the_threshold() -> None:
    values = losses(500)
    for i in range(200, 400, 3):
        values[i] += 10
    assert spikes(values, GuardArgs(spike_rows=2)) == []
    assert spikes(values, GuardArgs(spike_rows=1))[0] == (2000, 2010, 2010)


def test_a_lasting_change_is_reported_once() -> None:
    values = [*losses(300), *(v + 5 for v in losses(300, 1))]
    assert len(spikes(values, GuardArgs())) == 1


def test_too_few_losses_are_not_judged() -> None:
    args = GuardArgs(spike_window=16, spike_rows=1)
    assert spikes([3.0, 3.1, 3.0, 90.0], args) == []
    assert spikes([3.0, 3.1, 3.0, math.nan], args) == [(30, 40, 40)]
    assert spikes([3.0, math.nan], GuardArgs(spike_action="none", spike_rows=1)) == []


def test_a_restored_detector_decides_the_same() -> None:
    values, args = losses(400), GuardArgs()
    for i in range(301, 320):
        values[i] += 2
    whole, cut = SpikeDetector(args), SpikeDetector(args)
    for step, value in enumerate(values):
        if step in (5, 100, 303):  # also between the high losses
            cut = SpikeDetector(args, json.loads(json.dumps(cut.state())))
        assert whole.add(step, value) == cut.add(step, value)


def test_persistently_non_finite_steps_end_the_run_and_name_the_checkpoint() -> None:
    run = Path("runs/mine")
    check_progress(9, 10, 20, run, "iter-00000010-ckpt.pth")
    with pytest.raises(AgreedError, match="--resume iter-00000010-ckpt.pth.*trace_data.py step runs/mine 10$") as error:
        check_progress(10, 10, 20, run, "iter-00000010-ckpt.pth")
    assert error.value.sound
    with pytest.raises(AgreedError, match="start again in another --out_dir"):
        check_progress(10, 10, 20, run, None)


def test_a_signal_is_agreed_on_by_the_sum() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        request, signals.kept = StopRequest(torch.device("cpu"), signals), True
        request.summed(torch.tensor(request.flags(failed=False), dtype=torch.float64))
        assert request.agreed() == (None, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        mine = torch.tensor(request.flags(failed=False), dtype=torch.float64)
        request.summed(mine + torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0]))  # two other ranks have failed
        assert request.agreed() == ("SIGUSR1", True)
        assert request.flags(failed=True)[-1] == 1.0
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("losses", "warned"), [((6.2, 7.9), True), ((6.2, 6.1), False), ((6.2,), False), ((6.2, math.nan), True)]
)
def test_a_run_that_learned_nothing_ends_with_a_warning(
    losses: tuple[float, ...], warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [{"step": step, "val_loss": loss} for step, loss in enumerate(losses)])
    warn_if_nothing_was_learned(run)
    printed = "".join(capsys.readouterr())
    assert (f"ended at {losses[-1]:.3f}, no lower than the first, 6.200" in printed) == warned
    warn_if_nothing_was_learned(tmp_path / "none")  # lost meanwhile: nothing to say
