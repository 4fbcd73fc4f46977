"""Distillation loss, computed a chunk of tokens at a time so that no model's full logits ever exist.

Dimensions: B batch, T tokens in a row, N tokens of the batch, n tokens of a chunk, C n_embd (C_k of a teacher),
V padded vocabulary (V_k of a teacher), v vocabulary, k tokens of a top-k cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_model.loss import (
    Chunk,
    LossOutput,
    chunked_cross_entropy,
    chunked_head_loss,
    head_dtype,
    tokens_of_chunk,
    wide,
)

Divergence = Literal["forward_kl", "reverse_kl", "js", "mse", "topk_kl"]
Ensemble = Literal["logits", "probabilities"]

# (n, v) tensors in float32 that live at once, of all models together: a divergence holds the student's logits, both
# log-probabilities and one more.
LOGITS_HELD = 4
# 262 tokens at a vocabulary of 32000. With fewer, reading the heads for every chunk costs more than the products; with
# more, a tensor exceeds 32 MiB, above which glibc requests new memory from the kernel each time.
CPU_CHUNK_BYTES = LOGITS_HELD * 32 * 2**20


class Teacher(NamedTuple):
    """A teacher's output for a batch: its last hidden states and its head, on the student's device."""

    hidden: Tensor
    """(B, T, C_k). The product with the head has its dtype; everything after it is float32 or wider."""
    weight: Tensor
    """(V_k, C_k) with V_k >= the vocabulary; rows beyond it are padding."""
    bias: Tensor | None
    """(V_k,)."""
    softcap: float | None
    """c of c tanh(z / c)."""
    share: float
    """Its weight in the ensemble, above 0; the shares add up to 1."""


class TopK(NamedTuple):
    """A cached teacher: the log-probabilities, at the distillation's temperature, of its top k tokens."""

    ids: Tensor
    """Integer (B, T, k), distinct for each token; arbitrary at ignored targets."""
    log_probs: Tensor
    """Floating (B, T, k). The rest has probability 1 - sum(exp(log_probs)), or 0 where rounding makes that negative."""


@dataclass(frozen=True)
class Distillation:
    """The divergence between student and teachers: p_s = softmax(z_s / temperature), and p_t likewise."""

    divergence: Divergence = "forward_kl"
    """`forward_kl` is KL(p_t || p_s), `reverse_kl` KL(p_s || p_t), `js` the mean of the KL of both to their mean, `mse`
    the mean over the vocabulary of the squared difference of logits, `topk_kl` the forward KL over the teacher's top
    `top_k` tokens and one more event for all others."""
    temperature: float = 2.0
    """Divides the logits of both sides; the divergence is multiplied by its square, so that gradients keep their size
    (Hinton et al. 2015, section 2.1). `mse` is without it."""
    ensemble: Ensemble = "logits"
    """The quantity averaged over the teachers, weighted by their shares: `logits`, before the softmax, or
    `probabilities`, after it."""
    top_k: int | None = None
    """Tokens of `topk_kl`. For cached teachers it may be omitted, or must equal that of the cache."""

    def __post_init__(self) -> None:
        for field, known in (("divergence", get_args(Divergence)), ("ensemble", get_args(Ensemble))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} {getattr(self, field)!r} is unknown; choose one of {', '.join(known)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 and finite")
        if self.divergence == "mse" and self.ensemble != "logits":
            raise ValueError("divergence 'mse' compares logits: it needs ensemble 'logits', not 'probabilities'")
        if self.top_k is not None and self.divergence != "topk_kl":
            raise ValueError(f"top_k {self.top_k} is for divergence 'topk_kl', not {self.divergence!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; at least 1 is needed")

    @property
    def softening(self) -> float:
        """The temperature, or 1 where the divergence does not use it."""
        return 1.0 if self.divergence == "mse" else self.temperature


class TeacherHead(NamedTuple):
    """The head of `GPT.forward` that makes a model a teacher: its last hidden states and its head, whole."""

    share: float
    """The teacher's weight in the ensemble."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, *_: Any, bias: Tensor | None, softcap: float | None, **__: Any
    ) -> Teacher:
        return Teacher(hidden, weight, bias, softcap, self.share)


class DistillationHead(NamedTuple):
    """The head of `GPT.forward` that makes a model a student, for one micro-batch; see `chunked_distillation`."""

    teacher: Sequence[Teacher] | TopK
    setting: Distillation
    alpha: float
    divergence_scale: Tensor | float

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, **options: Any) -> LossOutput:
        return chunked_distillation(
            *(hidden, weight, targets, vocab_size, self.teacher, self.setting),
            alpha=self.alpha,
            divergence_scale=self.divergence_scale,
            **options,
        )


def chunked_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    teacher: Sequence[Teacher] | TopK,
    setting: Distillation,
    *,
    alpha: float,
    divergence_scale: Tensor | float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """Cross-entropy with the targets, mixed with the divergence from the teachers, summed over targets not ignored.

    The loss of a token is alpha * cross-entropy + (1 - alpha) * temperature^2 * divergence_scale * divergence (Hinton
    et al. 2015, section 2; `mse` without temperature^2). hidden (B, T, C) or (N, C), weight, targets, bias, softcap,
    z_loss and autocast are as in `chunked_cross_entropy`, to which alpha = 1 is equal bit for bit; z-loss is not scaled
    by alpha. `divergence_scale` is a number or a 0-d tensor, without gradient.

    `teacher` is one or more live teachers, or one that was cached; a cached one supports `topk_kl`, and `forward_kl` if
    it holds the whole vocabulary. Teachers get no gradient; their tensors may come from inference mode. `chunk_bytes`
    bounds the float32 logits of all models held at once. All gradients of the student are computed in the forward,
    chunk by chunk, in float32 (float64 for float64), those of head and bias accumulated in it. Raises ValueError where
    the teacher does not support the divergence.
    """
    _check(teacher, setting, vocab_size)
    factor = (1 - alpha) * setting.softening**2 * divergence_scale
    if isinstance(factor, Tensor):
        factor = factor.detach().to(hidden.device, wide(head_dtype(hidden)))
    flat_teacher = TopK(*(x.flatten(0, -2) for x in teacher)) if isinstance(teacher, TopK) else _flat_teachers(teacher)
    terms = _Terms(alpha, factor, z_loss, softcap, vocab_size)
    loss_sum, numbers = chunked_head_loss(
        *(hidden, weight, bias, targets),
        partial(_loss_of_chunk, teacher=flat_teacher, setting=setting, terms=terms),
        terms.total,
        n_numbers=3,
        chunk_tokens=_chunk_tokens(hidden.device.type, weight.shape[0], chunk_bytes),
        needs_gradient=alpha != 1,
    )
    divergence_sum = numbers[2].sum()
    if alpha == 1:  # the student's logits are computed twice, so that no bit depends on whether there are teachers
        return chunked_cross_entropy(
            hidden, weight, targets, vocab_size, bias=bias, softcap=softcap, z_loss=z_loss, chunk_bytes=chunk_bytes
        )._replace(divergence_sum=divergence_sum)
    return LossOutput(loss_sum, numbers[0], numbers[0].sum(), divergence_sum)


@torch.no_grad()
def ensemble_top_k(
    teachers: Sequence[Teacher], setting: Distillation, vocab_size: int, k: int, *, chunk_bytes: int | None = None
) -> TopK:
    """The top k tokens to cache for `setting`'s temperature and ensemble, most probable first, ids in int64.

    In chunks, as in `chunked_distillation`. Raises ValueError for `mse`, which compares logits.
    """
    if setting.divergence == "mse":
        raise ValueError("divergence 'mse' compares logits: it needs live teachers, not cached probabilities")
    shape, device = teachers[0].hidden.shape[:-1], teachers[0].hidden.device.type
    flat, dtype = _flat_teachers(teachers), wide(teachers[0].hidden.dtype)
    chunk_tokens = _chunk_tokens(device, max(t.weight.shape[0] for t in teachers), chunk_bytes)
    kept = []
    with torch.autocast(device, enabled=False):
        for start in range(0, shape.numel(), chunk_tokens):
            some = [t._replace(hidden=t.hidden[start : start + chunk_tokens]) for t in flat]
            kept.append(_ensemble(some, setting, vocab_size, dtype).topk(k, dim=-1))
    ids, log_probs = torch.cat([best.indices for best in kept]), torch.cat([best.values for best in kept])
    return TopK(ids.view(*shape, k), log_probs.view(*shape, k))


def _chunk_tokens(device_type: str, head_rows: int, chunk_bytes: int | None) -> int:
    return tokens_of_chunk(device_type, head_rows, chunk_bytes, CPU_CHUNK_BYTES, LOGITS_HELD)


def _check(teacher: Sequence[Teacher] | TopK, setting: Distillation, vocab_size: int) -> None:
    if isinstance(teacher, TopK):
        cached = teacher.ids.shape[-1]
        whole = setting.divergence == "forward_kl" and cached == vocab_size
        if setting.divergence != "topk_kl" and not whole:
            raise ValueError(
                f"divergence {setting.divergence!r} can't be computed from a cache of the teacher's top {cached} of "
                f"{vocab_size} tokens: use 'topk_kl', a live teacher, or for 'forward_kl' a cache of all tokens"
            )
        if setting.top_k not in (None, cached):
            raise ValueError(f"top_k is {setting.top_k}, but the cache holds the teacher's top {cached} tokens")
        return
    if setting.divergence == "topk_kl" and (setting.top_k is None or setting.top_k > vocab_size):
        raise ValueError(
            f"top_k is {setting.top_k}; divergence 'topk_kl' needs a value from 1 to the vocabulary size {vocab_size}"
        )
    assert math.isclose(sum(t.share for t in teacher), 1, rel_tol=1e-6) and all(t.share > 0 for t in teacher)
    assert all(t.weight.shape[0] >= vocab_size for t in teacher)


# --- divergences -----------------------------------------------------------------------------------------------------
# Each takes the log-probabilities of both sides, (n, v), which it overwrites, and gives D (n,) and dD/dx (n, v), where
# x = z_s / temperature are the student's softened logits. With g = dD/dp_s the softmax gives
# dD/dx = p_s (g - sum_j p_s,j g_j), in which a constant in g cancels.


def _forward_kl(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """sum p_t ln(p_t / p_s): g = -p_t / p_s, hence dD/dx = p_s - p_t (Hinton et al. 2015, equation 2)."""
    ratio = log_t - log_s
    p_t = log_t.exp_()
    return ratio.mul_(p_t).sum(-1), log_s.exp_().sub_(p_t)


def _reverse_kl(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """sum p_s ln(p_s / p_t): g = ln(p_s / p_t), hence dD/dx = p_s (g - D) (Gu et al. 2024, MiniLLM, take this KL)."""
    ratio = torch.sub(log_s, log_t, out=log_t)
    p_s = log_s.exp_()
    gradient = p_s * ratio
    divergence = gradient.sum(-1)
    return divergence, gradient.addcmul_(p_s, divergence.unsqueeze(-1), value=-1)


def _js(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p_t || m) + KL(p_s || m)) / 2 with m = (p_t + p_s) / 2 (Lin 1991, equation 3.1, equal weights).

    g = ln(p_s / m) / 2, since the derivatives through m add up to a constant; hence dD/dx = p_s (ln(p_s / m) -
    KL(p_s || m)) / 2. With q = ln(p / m) <= ln 2 a side's sum is m q exp(q), which nowhere overflows.
    """
    m = torch.logaddexp(log_s, log_t).sub_(math.log(2))
    q_t, q_s, m = log_t.sub_(m), log_s.sub_(m), m.exp_()
    y = q_t.exp_()
    kl_t = torch.special.entr(y, out=y).mul_(m).sum(-1).neg_()  # entr(y) = -y ln y
    gradient = torch.exp(q_s, out=y).mul_(m).mul_(q_s)  # p_s q_s
    kl_s = gradient.sum(-1)
    p_s = q_s.exp_().mul_(m)
    return (kl_t + kl_s).div_(2), gradient.addcmul_(p_s, kl_s.unsqueeze(-1), value=-1).div_(2)


def _mse(logits_s: Tensor, logits_t: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits, not log-probabilities: the mean of (z_s - z_t)^2 over v tokens, dD/dz_s = 2 (z_s - z_t) / v."""
    difference = logits_s.sub_(logits_t)
    return difference.square().mean(-1), difference.mul_(2 / difference.shape[-1])


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "mse": _mse,
}


def _topk_kl(x: Tensor, cached: TopK) -> tuple[Tensor, Tensor]:
    """Forward KL over the cached tokens K and one event for the rest: x (n, v), ids and log-probabilities (n, k).

    With l_K and l_R the log-sum-exps of x over K and over the rest, the rest has ln r_s = l_R - logaddexp(l_K, l_R):
    finite however confident the student is of K, unlike 1 - sum p_s. By the grouping rule of the KL, dD/dx is p_s - p_t
    in K and, in the rest, the share exp(x - l_R) of its event's r_s - r_t.
    """
    ids, log_t = cached.ids, cached.log_probs
    x_k = x.gather(-1, ids)  # (n, k)
    if ids.shape[-1] == x.shape[-1]:  # there is no rest
        log_z = x_k.logsumexp(-1)  # (n,)
        rest, difference = torch.zeros_like(log_z), torch.empty(0)
    else:
        log_k = x_k.logsumexp(-1)
        log_r = x.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        log_z = torch.logaddexp(log_k, log_r)
        r_t = (1 - log_t.exp().sum(-1)).clamp_min_(0)
        rest = torch.xlogy(r_t, r_t) - r_t * (log_r - log_z)
        difference = (log_r - log_z).exp() - r_t
        x.sub_(log_r.unsqueeze(-1)).exp_().mul_(difference.unsqueeze(-1))
    log_s, p_t = x_k - log_z.unsqueeze(-1), log_t.exp()
    inside = torch.where(p_t == 0, 0, p_t * (log_t - log_s))  # a cache in low precision may hold -inf
    return inside.sum(-1) + rest, x.scatter_(-1, ids, log_s.exp() - p_t)


# --- chunks ----------------------------------------------------------------------------------------------------------

_Teachers: TypeAlias = list[Teacher] | TopK


class _Terms(NamedTuple):
    """The terms of the loss besides the divergence itself."""

    alpha: float
    factor: Tensor | float
    """Of the divergence: (1 - alpha) temperature^2 divergence_scale."""
    z_loss: float
    softcap: float | None
    """The student's."""
    vocab_size: int

    def total(self, numbers: Tensor) -> Tensor:
        """The loss from (3, N): cross-entropy, log-normaliser, divergence."""
        token_losses, log_z, divergences = numbers
        loss_sum: Tensor = self.alpha * token_losses.sum() + self.factor * divergences.sum()
        return loss_sum + self.z_loss * log_z.square().sum() if self.z_loss else loss_sum


def _flat_teachers(teachers: Sequence[Teacher]) -> list[Teacher]:
    """Tokens in one dimension; the heads in the dtype of their hidden states."""
    return [
        Teacher(h.flatten(0, -2), weight.to(h.dtype), None if bias is None else bias.to(h.dtype), softcap, share)
        for h, weight, bias, softcap, share in teachers
    ]


def _rows(teacher: _Teachers, chunk: slice, ignored: Tensor) -> _Teachers:
    """The rows of a chunk, zeroed where ignored: the values there may be NaN, the ids out of range."""
    if isinstance(teacher, TopK):
        ids, log_probs = teacher.ids[chunk].long(), teacher.log_probs[chunk]
        return TopK(ids.masked_fill(ignored, 0), log_probs.masked_fill(ignored, 0))
    return [t._replace(hidden=t.hidden[chunk].masked_fill(ignored, 0)) for t in teacher]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """(n, v), contiguous; cut from the product with the padded head, whose shape suits matrix units better."""
    logits = F.linear(hidden, weight, bias)[:, :vocab_size].to(dtype).contiguous()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _ensemble(teachers: list[Teacher], setting: Distillation, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """ln p_t, (n, v), or for `mse` the mean of the logits. Probabilities are added as logarithms, so that none is 0."""
    total: Tensor | None = None
    for hidden, weight, bias, softcap, share in teachers:
        logits = _logits(hidden, weight, bias, softcap, vocab_size, dtype)
        if setting.ensemble == "logits":
            logits.mul_(share / setting.softening)
            total = logits if total is None else total.add_(logits)
        else:
            logits.mul_(1 / setting.softening)
            torch.log_softmax(logits, dim=-1, out=logits).add_(math.log(share))
            total = logits if total is None else torch.logaddexp(total, logits, out=total)
        del logits  # before the next teacher's
    assert total is not None
    if setting.ensemble == "logits" and setting.divergence != "mse":
        torch.log_softmax(total, dim=-1, out=total)
    return total


def _diverge(logits: Tensor, teacher: _Teachers, setting: Distillation) -> tuple[Tensor, Tensor]:
    """D (n,) and dD/dx (n, v); the student's logits (n, v) are not changed."""
    if isinstance(teacher, TopK):
        cached = teacher._replace(log_probs=teacher.log_probs.to(logits.dtype))
    else:
        log_t = _ensemble(teacher, setting, logits.shape[-1], logits.dtype)
        if setting.divergence != "topk_kl":
            x = logits * (1 / setting.softening)
            if setting.divergence != "mse":
                torch.log_softmax(x, dim=-1, out=x)
            return _DIVERGENCES[setting.divergence](x, log_t)
        assert setting.top_k is not None
        best = log_t.topk(setting.top_k, dim=-1)
        del log_t
        cached = TopK(best.indices, best.values)
    return _topk_kl(logits * (1 / setting.softening), cached)


def _loss_of_chunk(
    chunk: Chunk, teacher: _Teachers, setting: Distillation, terms: _Terms
) -> tuple[Tensor, Tensor | None]:
    """(3, n): cross-entropy, log-normaliser, divergence; and the gradient of the loss, (n, v), without padding."""
    target = chunk.target
    logits = _logits(
        *(chunk.hidden, chunk.weight, chunk.bias, terms.softcap, terms.vocab_size), wide(chunk.hidden.dtype)
    )
    teacher = _rows(teacher, chunk.rows, chunk.ignored)
    divergence, gradient = _diverge(logits, teacher, setting)
    slope = None
    if terms.softcap is not None and chunk.needs_gradient:  # of c tanh(z / c): 1 - tanh^2
        slope = logits.div(terms.softcap).square_().neg_().add_(1)
    target_logits = logits.gather(1, target).squeeze(-1)  # (n,)
    # In place from here: logits become log-probabilities, then probabilities.
    torch.log_softmax(logits, dim=-1, out=logits)
    losses = logits.gather(1, target).squeeze(-1).neg_()
    log_z = losses + target_logits  # the normaliser without another pass over the logits
    numbers = torch.stack((losses, log_z, divergence))
    if not chunk.needs_gradient:
        return numbers, None
    # d/dz of cross-entropy is p - onehot, of z_loss ln(Z)^2 it is 2 z_loss ln(Z) p, and dx/dz = 1 / temperature.
    gradient.mul_(terms.factor / setting.softening)
    if terms.z_loss:
        gradient.addcmul_(logits.exp_(), (terms.alpha + 2 * terms.z_loss * log_z).unsqueeze(-1))
    elif terms.alpha:
        gradient.add_(logits.exp_(), alpha=terms.alpha)
    gradient.scatter_add_(1, target, torch.full_like(target, -terms.alpha, dtype=gradient.dtype))
    return numbers, gradient if slope is None else gradient.mul_(slope)
