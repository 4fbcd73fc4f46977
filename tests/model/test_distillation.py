"""The chunked distillation loss, compared with plain autograd over all models' full logits in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_model.distillation import Distillation, Teacher, TopK, chunked_distillation, ensemble_top_k
from lit_model.loss import IGNORE_INDEX, chunked_cross_entropy

VOCAB, PADDED = 41, 48
SETTINGS = [
    Distillation(divergence, temperature, ensemble, 5 if divergence == "topk_kl" else None)
    for divergence in ("forward_kl", "reverse_kl", "js", "mse", "topk_kl")
    for ensemble, temperature in (("logits", 2.0), ("probabilities", 0.7))
    if (divergence, ensemble) != ("mse", "probabilities")
]
SHARES = {1: [1.0], 2: [0.3, 0.7], 3: [0.5, 0.2, 0.3]}


def name(setting):
    return f"{setting.divergence}-{setting.ensemble}"


def padded(generator, rows, columns, spread=1.0):
    """A head's weight or bias, with padding rows that would dominate every softmax."""
    drawn = spread * torch.randn(*([rows, columns] if columns else [rows]), generator=generator, dtype=torch.float64)
    drawn[VOCAB:] = 1e3
    return drawn


def draw(B=3, T=7, C=12, with_bias=True, ignore=0.3, seed=0):
    """(hidden, weight, bias, targets) of a student in float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, C, generator=g, dtype=torch.float64)
    weight, bias = padded(g, PADDED, C, 0.4), padded(g, PADDED, 0) if with_bias else None
    targets = torch.randint(0, VOCAB, (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < ignore] = IGNORE_INDEX
    return hidden, weight, bias, targets


def draw_teachers(number, B=3, T=7, seed=1):
    """Teachers of different widths and paddings; the second has no bias but a soft-cap."""
    g = torch.Generator().manual_seed(seed)
    teachers = []
    for k, share in enumerate(SHARES[number]):
        width, rows = 5 + 4 * k, VOCAB + 7 * (2 - k)  # the third has no padding
        hidden = torch.randn(B, T, width, generator=g, dtype=torch.float64)
        bias = None if k == 1 else padded(g, rows, 0)
        teachers.append(Teacher(hidden, padded(g, rows, width, 0.6), bias, 2.5 if k == 1 else None, share))
    return teachers


def full_logits(hidden, weight, bias, softcap):
    logits = F.linear(hidden, weight, bias)[..., :VOCAB]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def divergence_of(z, teachers, setting):
    """The divergence of each token (..., VOCAB) -> (...), by definition. `teachers` are logits of equal shape and
    weights.
    """
    tau = setting.temperature
    mean = sum(share * logits for logits, share in teachers)
    if setting.divergence == "mse":
        return (z - mean).square().mean(-1)
    p_s = (z / tau).softmax(-1)
    if setting.ensemble == "logits":
        p_t = (mean / tau).softmax(-1)
    else:
        p_t = sum(share * (logits / tau).softmax(-1) for logits, share in teachers)
    if setting.divergence == "forward_kl":
        return (p_t * (p_t / p_s).log()).sum(-1)
    if setting.divergence == "reverse_kl":
        return (p_s * (p_s / p_t).log()).sum(-1)
    if setting.divergence == "js":
        m = (p_t + p_s) / 2
        return ((p_t * (p_t / m).log()).sum(-1) + (p_s * (p_s / m).log()).sum(-1)) / 2
    likeliest = torch.zeros_like(p_t, dtype=torch.bool).scatter_(-1, p_t.argsort(-1)[..., -setting.top_k :], True)
    inside = torch.where(likeliest, p_t * (p_t / p_s).log(), 0).sum(-1)
    r_t, r_s = (torch.where(likeliest, 0, p).sum(-1) for p in (p_t, p_s))
    return inside if setting.top_k == VOCAB else inside + r_t * (r_t / r_s).log()


def full(hidden, weight, bias, targets, teachers, setting, alpha, scale=1.0, softcap=None, z_loss=0.0):
    """(loss, cross-entropy of each token, sum of the divergence), from full logits and differentiable by autograd."""
    z = full_logits(hidden, weight, bias, softcap)
    valid = targets != IGNORE_INDEX
    losses = F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    with torch.no_grad():
        held = [(full_logits(*teacher[:4]).to(z.dtype), teacher.share) for teacher in teachers]
    divergence = divergence_of(z, held, setting)[valid].sum()
    squares = z.logsumexp(-1)[valid].square().sum()
    factor = 1 if setting.divergence == "mse" else setting.temperature**2
    total = alpha * losses.sum() + (1 - alpha) * factor * scale * divergence + z_loss * squares
    return total, losses.view(targets.shape), divergence


def chunked(hidden, weight, bias, targets, teachers, setting, alpha, scale=1.0, softcap=None, z_loss=0.0, tokens=None):
    out = chunked_distillation(
        *(hidden, weight, targets, VOCAB, teachers, setting),
        **{"alpha": alpha, "divergence_scale": scale, "bias": bias, "softcap": softcap, "z_loss": z_loss},
        chunk_bytes=None if tokens is None else 4 * 4 * PADDED * tokens,
    )
    assert out.cross_entropy_sum == out.token_losses.sum()
    assert not (out.token_losses.requires_grad or out.divergence_sum.requires_grad)
    return out.loss_sum, out.token_losses, out.divergence_sum


def numbers(loss, hidden, weight, bias, *args, dtype=torch.float64, autocast=False, **options):
    """[loss, token losses, divergence, gradients of hidden, weight and, if there is one, of bias], all detached."""
    leaves = [x if x is None else x.detach().to(dtype).clone().requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = loss(*leaves, *args, **options)
    (0.37 * found[0]).backward()
    return [x.detach() for x in found] + [x.grad for x in leaves if x is not None]


def to(teachers, dtype):
    return [t._replace(**{f: x.to(dtype) for f, x in t._asdict().items() if torch.is_tensor(x)}) for t in teachers]


def assert_near(got, want, tolerance, dtype):
    assert len(got) == len(want)
    for value, exact in zip(got, want, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_equals_reference(setting, number):
    cases = zip([1, 4, 20, 21, None], itertools.cycle([(True, None), (False, 1.5), (True, 4.0)]))
    for tokens, (with_bias, softcap) in cases:
        *tensors, targets = draw(with_bias=with_bias)
        teachers = draw_teachers(number)
        options = {"alpha": 0.3, "scale": torch.tensor(1.7), "softcap": softcap, "z_loss": 0.01 if tokens == 4 else 0.0}
        want = numbers(full, *tensors, targets, teachers, setting, **options)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
            given = to(teachers, dtype)
            got = numbers(chunked, *tensors, targets, given, setting, dtype=dtype, tokens=tokens, **options)
            assert_near(got, want, tolerance, dtype)
        ignored = targets == IGNORE_INDEX
        assert ignored.any() and (got[1][ignored] == 0).all() and (got[3][ignored] == 0).all()
        assert all((gradient[VOCAB:] == 0).all() for gradient in got[4:])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    setting=st.sampled_from(SETTINGS),
    number=st.integers(1, 3),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.3, 8),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_equals_reference_at_any_setting(setting, number, alpha, temperature, tokens, seed):
    setting = Distillation(setting.divergence, temperature, setting.ensemble, setting.top_k)
    arguments = (*draw(seed=seed), draw_teachers(number, seed=seed + 1), setting, alpha)
    assert_near(numbers(chunked, *arguments, tokens=tokens), numbers(full, *arguments), 1e-11, torch.float64)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_gradcheck(setting):
    *tensors, targets = draw(B=1, T=3, C=4)
    teachers = draw_teachers(2, B=1, T=3)

    def loss(*leaves):
        return chunked(*leaves, targets, teachers, setting, 0.3, softcap=4.0, z_loss=0.1, tokens=2)[0]

    class Anew(torch.autograd.Function):  # gradcheck goes backward twice, which the loss refuses
        @staticmethod
        def forward(ctx, *leaves):
            ctx.leaves = leaves
            return loss(*leaves)

        @staticmethod
        def backward(ctx, gradient):
            leaves = [x.detach().requires_grad_() for x in ctx.leaves]
            with torch.enable_grad():
                return torch.autograd.grad(loss(*leaves), leaves, gradient)

    tensors[1], tensors[2] = tensors[1][:VOCAB], tensors[2][:VOCAB]  # a finite difference of 1e3 is meaningless
    assert torch.autograd.gradcheck(Anew.apply, [x.requires_grad_() for x in tensors], eps=1e-5, atol=1e-8)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_equal_to_its_teacher(setting, dtype):
    """The divergence and its gradient are 0 up to rounding, also with alpha 0."""
    hidden, weight, bias, targets = (x.to(dtype) if x.is_floating_point() else x for x in draw())
    teachers = [Teacher(hidden, weight, bias, 4.0, share) for share in (0.25, 0.75)]
    got = numbers(chunked, hidden, weight, bias, targets, teachers, setting, 0.0, softcap=4.0, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert got[2].abs() <= targets.numel() * eps
    for gradient in got[3:]:  # far below a single token's cross-entropy
        assert gradient[:VOCAB].abs().max() <= 100 * eps


def cache(teachers, setting, k):
    """The content of a cache, computed from full logits in float64."""
    logits = [(full_logits(*t[:4]), t.share) for t in teachers]
    if setting.ensemble == "logits":
        log_probs = (sum(s * z for z, s in logits) / setting.temperature).log_softmax(-1)
    else:
        log_probs = sum(s * (z / setting.temperature).softmax(-1) for z, s in logits).log()
    best = log_probs.topk(k)
    return TopK(best.indices.int(), best.values)


@pytest.mark.parametrize("ensemble", ["logits", "probabilities"])
def test_cached_teacher_equals_live_one(ensemble):
    tensors, teachers = draw(), draw_teachers(2)
    whole = Distillation("forward_kl", 1.5, ensemble)
    live = numbers(chunked, *tensors, teachers, whole, 0.3, tokens=4)
    for setting in (whole, Distillation("topk_kl", 1.5, ensemble), Distillation("topk_kl", 1.5, ensemble, VOCAB)):
        got = numbers(chunked, *tensors, cache(teachers, whole, VOCAB), setting, 0.3, tokens=4)
        assert_near(got, live, 1e-12, torch.float64)
    for k in (1, 5, VOCAB - 1, VOCAB):
        setting = Distillation("topk_kl", 1.5, ensemble, k)
        live = numbers(chunked, *tensors, teachers, setting, 0.3, tokens=4)
        for asked in (setting, Distillation("topk_kl", 1.5, ensemble)):
            got = numbers(chunked, *tensors, cache(teachers, setting, k), asked, 0.3, tokens=4)
            assert_near(
                got, live, 1e-9 if k == VOCAB - 1 else 1e-12, torch.float64
            )  # where the remaining probability cancels most


@pytest.mark.parametrize("ensemble", ["logits", "probabilities"])
def test_what_a_cache_stores(ensemble):
    tensors, teachers, setting = draw(), draw_teachers(3), Distillation("forward_kl", 1.5, ensemble)
    for k, tokens in ((1, None), (5, 4), (VOCAB, 20)):
        want = cache(teachers, setting, k)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            chunk_bytes = None if tokens is None else 4 * 4 * (VOCAB + 14) * tokens
            got = ensemble_top_k(to(teachers, dtype), setting, VOCAB, k, chunk_bytes=chunk_bytes)
            assert torch.equal(got.ids, want.ids.long()) and got.log_probs.dtype == dtype
            torch.testing.assert_close(got.log_probs.double(), want.log_probs, rtol=tolerance, atol=tolerance)
        likeliest = Distillation("topk_kl", 1.5, ensemble, k)
        live = numbers(chunked, *tensors, teachers, likeliest, 0.3, tokens=7)
        cached = numbers(chunked, *tensors, ensemble_top_k(teachers, likeliest, VOCAB, k), likeliest, 0.3, tokens=4)
        assert_near(cached, live, 1e-11, torch.float64)
    with pytest.raises(ValueError, match="'mse' compares logits: it needs live teachers"):
        ensemble_top_k(teachers, Distillation("mse", 1.5, "logits"), VOCAB, 5)


def test_fewer_cached_tokens_only_lose_divergence():
    """Grouping events never raises a KL divergence (Cover and Thomas 2006, theorem 2.7.1)."""
    tensors, teachers = draw(), draw_teachers(3)
    found = [
        chunked(*tensors, teachers, Distillation("topk_kl", 2.0, "logits", k), 0.3)[2].item()
        for k in range(1, VOCAB + 1)
    ]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found)) and 0 < found[0] < 0.9 * found[-1]


def test_a_cache_may_contain_anything_for_ignored_tokens():
    hidden, weight, bias, targets = draw()
    setting = Distillation("topk_kl", 2.0, "logits", 5)
    kept = cache(draw_teachers(1), setting, 5)
    want = numbers(chunked, hidden, weight, bias, targets, kept, setting, 0.3)
    ignored = targets == IGNORE_INDEX
    ids, log_probs = kept.ids.clone(), kept.log_probs.clone()
    ids[ignored], log_probs[ignored] = 10**6, torch.nan
    got = numbers(chunked, hidden, weight, bias, targets, TopK(ids, log_probs), setting, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    log_probs[..., -1] = -torch.inf  # a probability below the smallest number
    got = numbers(chunked, hidden, weight, bias, targets, TopK(ids, log_probs), setting, 0.3)
    assert all(x.isfinite().all() for x in got)


def test_ignored_rows_may_hold_anything():
    hidden, weight, bias, targets = draw()
    teachers, ignored = draw_teachers(2), targets == IGNORE_INDEX
    want = [numbers(chunked, hidden, weight, bias, targets, teachers, s, 0.3, tokens=4) for s in SETTINGS]
    for tensor in (hidden, *(t.hidden for t in teachers)):
        tensor[ignored] = torch.inf
    for setting, exact in zip(SETTINGS, want, strict=True):
        got = numbers(chunked, hidden, weight, bias, targets, teachers, setting, 0.3, tokens=4)
        assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    nothing = torch.full_like(targets, IGNORE_INDEX)
    got = numbers(chunked, hidden, weight, bias, nothing, teachers, SETTINGS[0], 0.3)
    assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_distributions_without_overlap(setting):
    """Logits that differ by hundreds, so that probabilities in float32 are 0: finite, and equal to float64."""
    targets = torch.tensor([[3, 4]])
    hidden, weight = torch.eye(2)[None], torch.zeros(VOCAB, 2)
    weight[5:15, 0], weight[1:4, 1] = 300, 200
    other = torch.zeros(VOCAB, 2)
    other[2:9, 0], other[0, 1] = 200, 400
    got = chunked_distillation(
        *(hidden.requires_grad_(), weight, targets, VOCAB, [Teacher(hidden.detach(), other, None, None, 1.0)], setting),
        alpha=0.3,
    )
    wide = hidden.detach().double().requires_grad_()
    want = chunked_distillation(
        *(wide, weight.double(), targets, VOCAB),
        *([Teacher(wide.detach(), other.double(), None, None, 1.0)], setting),
        alpha=0.3,
    )
    got.loss_sum.backward()
    want.loss_sum.backward()
    torch.testing.assert_close(got.divergence_sum.double(), want.divergence_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-2)  # for sums up to 3000


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_autocast_is_bounded_by_torchs_error(setting):
    *tensors, targets = draw(B=4, T=60, C=48)
    teachers = draw_teachers(2, B=4, T=60)
    exact = numbers(full, *tensors, targets, teachers, setting, 0.3, softcap=4.0)
    low = to(teachers, torch.bfloat16)
    options = {"softcap": 4.0, "dtype": torch.float32, "autocast": True}
    torchs = numbers(full, *tensors, targets, low, setting, 0.3, **options)
    got = numbers(chunked, *tensors, targets, low, setting, 0.3, tokens=64, **options)
    for value, own, want in zip(got[1:], torchs[1:], exact[1:], strict=True):
        assert value.dtype == torch.float32
        # The last term: the error of a sum over tokens depends on which errors cancel.
        assert (value - want).norm() <= 1.5 * (own - want).norm() + 1e-4 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_1_equals_cross_entropy_bit_for_bit(dtype):
    hidden, weight, bias, targets = (x.to(dtype) if x.is_floating_point() else x for x in draw(B=4, T=60))
    found = []
    for teachers in (None, draw_teachers(2, B=4, T=60)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        options = {"bias": leaves[2], "softcap": 4.0, "z_loss": 0.01, "chunk_bytes": 4 * PADDED * 16}
        if teachers is None:
            out = chunked_cross_entropy(*leaves[:2], targets, VOCAB, **options)
        else:
            setting = Distillation("forward_kl", 2.0, "logits")
            out = chunked_distillation(*leaves[:2], targets, VOCAB, teachers, setting, alpha=1.0, **options)
            assert out.divergence_sum > 0
        out.loss_sum.backward()
        found.append([out.loss_sum, out.token_losses, out.cross_entropy_sum, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_gradients_and_from_inference_mode():
    hidden, weight, bias, targets = draw()
    with torch.inference_mode():
        teachers = to(draw_teachers(2), torch.float32)
    want = numbers(full, hidden, weight, bias, targets, draw_teachers(2), SETTINGS[0], 0.3)
    leaves = [x.float().requires_grad_() for x in (hidden, weight, bias)]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = chunked(*leaves, targets, teachers, SETTINGS[0], 0.3, tokens=4)
        assert found[0].requires_grad == (mode is torch.enable_grad)
        for value, exact in zip(found, want, strict=False):
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_only_the_bias_learns():
    hidden, weight, bias, targets = draw()
    want = numbers(full, hidden, weight, bias, targets, draw_teachers(2), SETTINGS[1], 0.3)
    (0.37 * chunked(hidden, weight, bias.requires_grad_(), targets, draw_teachers(2), SETTINGS[1], 0.3)[0]).backward()
    torch.testing.assert_close(bias.grad, want[-1])


def test_second_backward_is_refused_not_wrong():
    loss = chunked(*(x.requires_grad_() for x in draw()[:3]), draw()[3], draw_teachers(1), SETTINGS[0], 0.3)[0]
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl' is unknown; choose one of forward_kl"),
        ({"ensemble": "votes"}, "ensemble 'votes' is unknown"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"divergence": "mse", "ensemble": "probabilities"}, "'mse' compares logits"),
        ({"divergence": "js", "top_k": 3}, "top_k 3 is for divergence 'topk_kl', not 'js'"),
        ({"divergence": "topk_kl", "top_k": 0}, "top_k is 0"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**fields)


def test_unusable_teachers_are_refused():
    tensors, teachers = draw(), draw_teachers(1)
    for k, divergence in ((5, "forward_kl"), (5, "js"), (VOCAB, "reverse_kl"), (VOCAB, "mse")):
        setting = Distillation(divergence, 2.0, "logits")
        with pytest.raises(
            ValueError, match=f"divergence '{divergence}' can't be computed from a cache of the teacher's top"
        ):
            chunked(*tensors, cache(teachers, setting, k), setting, 0.3)
    with pytest.raises(ValueError, match="top_k is 4, but the cache holds the teacher's top 5"):
        chunked(*tensors, cache(teachers, SETTINGS[0], 5), Distillation("topk_kl", 2.0, "logits", 4), 0.3)
    for top_k in (None, VOCAB + 1):
        with pytest.raises(ValueError, match=f"top_k is {top_k}; divergence 'topk_kl' needs"):
            chunked(*tensors, teachers, Distillation("topk_kl", 2.0, "logits", top_k), 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_cuda(setting):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    *tensors, targets = (x.cuda() for x in draw(B=8, T=256, C=64))
    teachers = to(draw_teachers(2, B=8, T=256), "cuda")
    options = {"alpha": 0.3, "softcap": 4.0, "z_loss": 0.01}
    want = numbers(full, *tensors, targets, teachers, setting, **options)
    low = to(teachers, torch.float32)
    got = numbers(chunked, *tensors, targets, low, setting, dtype=torch.float32, tokens=500, **options)
    assert_near(got, want, 1e-4, torch.float32)
    with torch.inference_mode():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        chunked(*(x.float() for x in tensors), targets, low, setting, 0.3, tokens=64)
        assert torch.cuda.max_memory_allocated() - before < targets.numel() * VOCAB * 4 * 3  # of three models at once
