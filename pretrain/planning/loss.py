"""Predicts the final loss of a run from finished smaller runs, with an interval.

The law is that of Hoffmann et al. 2022, equation 2: L(N, D) = E + A / N^alpha + B / D^beta, with N the parameters that
multiply a token and D the tokens seen. A few runs cannot fix five numbers, so they are not fitted but averaged over: on
a grid of exponents and noise levels the other three are a Bayesian linear regression, and the prediction is the mixture
of all grid points by how well each explains the runs. Few runs, or runs alike in size, give a wide interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lit_eval.run_facts import RunFacts, read_run
from lit_model.config import ModelConfig
from lit_model.cost import count_multiplying_parameters

FloatArray = npt.NDArray[np.float64]

LEAST_RUNS = 3
COVERAGE = 0.9
EXPONENTS = np.geomspace(0.05, 1.5, 24)
EXPONENT, EXPONENT_SPREAD = 0.35, 0.6
"""Median and standard deviation of the logarithm of both exponents: 0.34 and 0.28 in Hoffmann et al. 2022."""
NOISE = np.geomspace(0.002, 0.05, 8)
"""Standard deviations of a run's loss around the law, as fractions of the mean loss, equally likely on a log scale."""
SHARES, SHARE_SPREADS = np.array([0.5, 0.2, 0.3]), np.array([0.3, 0.2, 0.3])
"""Means and standard deviations of E, A / N^alpha and B / D^beta at the runs' mean size, as fractions of their loss."""
DRAWS = 40_000
LEAST_DRAWS = 1_000


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. `loss`: its last validation loss, nats per token."""

    name: str
    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class PredictedLoss:
    """Median and interval of COVERAGE, nats per token."""

    low: float
    median: float
    high: float


def read_finished_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs to predict from. Raises ValueError for one that cannot be compared with the others."""
    if len(set(folders)) < LEAST_RUNS:
        raise ValueError(f"--predict_loss needs {LEAST_RUNS} or more different runs; {len(set(folders))} given")
    facts = [read_run(folder) for folder in folders]
    first = _validated_on(facts[0])
    for run in facts[1:]:
        if _validated_on(run) != first:
            raise ValueError(
                f"{run.folder} was validated on other data than {facts[0].folder}: losses of different texts or "
                "tokenizers cannot be compared; give runs with the same --data.val"
            )
    return [_finished(run) for run in facts]


def _validated_on(run: RunFacts) -> object:
    if not run.meta:
        faults = f": {'; '.join(run.faults)}" if run.faults else ""
        raise ValueError(f"{run.folder} has no checkpoint that can be read{faults}; give finished runs")
    data = run.meta.get("data")
    found = data.get("val") if isinstance(data, dict) else None
    if found is None:
        raise ValueError(f"{run.folder} has no validation data: --predict_loss compares validation losses (--data.val)")
    return found


def _finished(run: RunFacts) -> FinishedRun:
    m, tokens, config = run.metrics, run.tokens, run.model
    if run.max_steps is None or run.step < run.max_steps:
        raise ValueError(f"{run.folder} is {run.status}: its learning rate has not decayed yet; give finished runs")
    losses = m["val_loss"][m["step"] == run.step]
    if not len(losses) or not np.isfinite(losses[-1]) or not tokens or config is None:
        raise ValueError(
            f"{run.folder} has no finite validation loss of a single set at its last step, {run.step}: a run that "
            "diverged, or with several sets in --data.val, cannot be used"
        )
    return FinishedRun(run.name, count_multiplying_parameters(config), tokens, float(losses[-1]))


def predict_loss(runs: Sequence[FinishedRun], config: ModelConfig, tokens: int, seed: int = 0) -> PredictedLoss:
    """The final loss of a model trained on so many tokens, in the same way as the runs."""
    draws = draw_losses(
        np.array([run.parameters for run in runs], dtype=np.float64),
        np.array([run.tokens for run in runs], dtype=np.float64),
        np.array([run.loss for run in runs], dtype=np.float64),
        count_multiplying_parameters(config),
        tokens,
        np.random.default_rng(seed),
    )
    tail = (1 - COVERAGE) / 2
    return PredictedLoss(*np.quantile(draws, [tail, 0.5, 1 - tail]).tolist())


def draw_losses(
    parameters: FloatArray,  # (R,)
    tokens: FloatArray,  # (R,)
    losses: FloatArray,  # (R,)
    n: float,
    d: float,
    rng: np.random.Generator,
) -> FloatArray:
    """Draws from the predictive distribution of the loss at `n` parameters and `d` tokens, given R runs."""
    scale = losses.mean()
    n_ratio = np.exp(np.log(parameters).mean()) / np.append(parameters, n)  # (R + 1,)
    d_ratio = np.exp(np.log(tokens).mean()) / np.append(tokens, d)
    alpha, beta, noise = (g.ravel() for g in np.meshgrid(EXPONENTS, EXPONENTS, NOISE, indexing="ij"))  # (G,)
    ones = np.ones((len(alpha), len(losses) + 1))
    x = np.stack([ones, n_ratio ** alpha[:, None], d_ratio ** beta[:, None]], axis=2)  # (G, R + 1, 3)
    seen, target, y = x[:, :-1], x[:, -1], losses / scale

    # Gaussian regression with a Gaussian prior and known noise: Bishop 2006, equations 3.50, 3.51 and 3.57.
    prior = SHARE_SPREADS**2
    residual = y - seen @ SHARES  # (G, R)
    covariance = (seen * prior) @ seen.transpose(0, 2, 1) + noise[:, None, None] ** 2 * np.eye(len(y))  # (G, R, R)
    gain = np.linalg.solve(covariance, seen * prior).transpose(0, 2, 1)  # (G, 3, R)
    mean = SHARES + (gain @ residual[..., None])[..., 0]  # (G, 3)
    spread = np.diag(prior) - gain @ (seen * prior)  # (G, 3, 3)
    log_weight = -0.5 * (residual * np.linalg.solve(covariance, residual[..., None])[..., 0]).sum(axis=1)
    log_weight -= 0.5 * np.linalg.slogdet(covariance)[1]
    for exponent in (alpha, beta):
        log_weight -= 0.5 * (np.log(exponent / EXPONENT) / EXPONENT_SPREAD) ** 2
    weight = np.exp(log_weight - log_weight.max())

    root = np.linalg.cholesky(spread + 1e-12 * np.eye(3))
    kept: list[FloatArray] = []
    for _ in range(100):  # E, A and B are positive: other draws are rejected
        chosen = rng.choice(len(weight), DRAWS, p=weight / weight.sum())
        coefficients = mean[chosen] + (root[chosen] @ rng.standard_normal((DRAWS, 3, 1)))[..., 0]
        valid = (coefficients > 0).all(axis=1)
        drawn = (coefficients * target[chosen]).sum(axis=1) + noise[chosen] * rng.standard_normal(DRAWS)
        kept.append(drawn[valid])
        if sum(map(len, kept)) >= LEAST_DRAWS:
            break
    found: FloatArray = np.concatenate(kept) * scale
    if not len(found):
        raise ValueError("the losses of these runs do not fall with size or tokens: nothing can be predicted from them")
    return found
