"""Attention with scale, sliding window, soft-cap, dropout and chunks, compared with an explicit formula in float64."""

import inspect
import itertools
import sys
import types
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lit_model.attention import chunk_boundaries
from lit_model.kernels import choose as choosing
from lit_model.kernels import cuda, plain
from lit_model.kernels.choose import attention, choose_attention
from lit_model.kernels.plain import cached_attention
from lit_model.kernels.variant import NAMES, PLAIN, SERVES, AttentionVariant


def formula(q, k, v, bounds, *, scale=None, window=None, softcap=None, chunk=None, keep=None):
    """softmax(cap(scale q k^T) + mask) v for (N, H, D) and (N, G, D), piece by piece, with masks set entry by entry.

    `keep` (H, N, N) multiplies the weights."""
    H, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    outs = []
    for start, end in itertools.pairwise(bounds):
        seen = [
            [
                j <= i and (window is None or j > i - window) and (chunk is None or i // chunk == j // chunk)
                for j in range(end - start)
            ]
            for i in range(end - start)
        ]
        mask = torch.tensor(seen, dtype=torch.bool).reshape(end - start, end - start)
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) * (D**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.where(mask, scores, -torch.inf).softmax(dim=-1)
        if keep is not None:
            weights = weights * keep[:, start:end, start:end]
        outs.append(torch.einsum("hij,jhd->ihd", weights, v[start:end]))
    return torch.cat(outs)


def draw_qkv(B, T, H, G, D, seed=0):
    """Views into one fused projection, as in the model, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, H + 2 * G, D, generator=generator, dtype=torch.float64)
    return 1.5 * qkv, torch.randn(B, T, H, D, generator=generator, dtype=torch.float64)


def run(qkv, grad, heads, attend):
    qkv = qkv.detach().clone().requires_grad_()
    y = attend(*qkv.split(heads, dim=2))
    y.backward(grad)
    return y.detach(), qkv.grad


def rows(attend_flat):
    """A function of (N, H, D) turned into one of (B, T, H, D)."""
    return lambda q, k, v: attend_flat(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)


def assert_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@st.composite
def batches(draw):
    """(B, T, boundaries or None, (H, G, D)); pieces of one token, equal neighbours and empty ones at the end."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    inside = draw(st.none() | st.lists(st.integers(1, B * T), max_size=6))
    bounds = None if inside is None else sorted({0, *range(T, B * T + 1, T), *inside}) + [B * T] * (len(inside) % 3)
    return B, T, bounds, (groups * per_group, groups, draw(st.sampled_from([2, 4, 6])))


variants = st.builds(
    AttentionVariant,
    scale=st.none() | st.sampled_from([0.1, 1.0]),
    window=st.none() | st.integers(1, 30),
    softcap=st.none() | st.sampled_from([0.7, 20.0]),
    dropout=st.just(0.0),  # otherwise drawn according to its annotation
)


def tensor(bounds):
    return None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


@settings(max_examples=60, deadline=None)
@given(batches(), variants, st.integers(1, 9), st.sampled_from(["loop", "dense", "other devices"]))
def test_every_variant_equals_the_formula(batch, variant, block, name):
    B, T, bounds, (H, G, D) = batch
    qkv, grad = draw_qkv(B, T, H, G, D)
    asked = {"scale": variant.scale, "window": variant.window, "softcap": variant.softcap}
    pieces = list(range(0, B * T + 1, T)) if bounds is None else bounds
    expected = run(qkv, grad, [H, G, G], rows(lambda q, k, v: formula(q, k, v, pieces, **asked)))
    with mock.patch.object(plain, "QUERY_BLOCK", block):
        if name == "other devices":
            got = run(qkv, grad, [H, G, G], lambda q, k, v: plain.plain_loop(q, k, v, tensor(bounds), *variant))
        else:
            got = run(qkv, grad, [H, G, G], lambda q, k, v: attention(q, k, v, tensor(bounds), name, variant))
    assert_equal(got, expected)


MIXED = AttentionVariant(scale=0.3, window=140, softcap=5.0)


@pytest.mark.parametrize("variant", [AttentionVariant(window=140), MIXED, AttentionVariant(softcap=5.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_bounded_by_the_reference(variant, dtype):
    """Rows of several blocks. The bound is the reference implementation's own error in this precision."""
    B, T, bounds = 1, 400, [0, 3, 300, 400]
    qkv, grad = (x.to(dtype) for x in draw_qkv(B, T, 4, 2, 8))
    asked = {"scale": variant.scale, "window": variant.window, "softcap": variant.softcap}
    exact = run(qkv.double(), grad.double(), [4, 2, 2], rows(lambda q, k, v: formula(q, k, v, bounds, **asked)))
    own = run(qkv, grad, [4, 2, 2], lambda q, k, v: attention(q, k, v, tensor(bounds), "dense", variant))
    got = run(qkv, grad, [4, 2, 2], lambda q, k, v: attention(q, k, v, tensor(bounds), "loop", variant))
    for mine, reference, true in zip(got, own, exact, strict=True):
        assert mine.dtype == dtype
        bound = 2 * (reference - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= bound


def test_soft_cap_is_rounded_only_at_the_end():
    """bfloat16 in and out, float32 in between, also under autocast."""
    qkv, _ = draw_qkv(2, 40, 4, 2, 8)
    q, k, v = qkv.bfloat16().split([4, 2, 2], dim=2)
    variant = AttentionVariant(window=9, softcap=3.0)
    exact = rows(lambda q, k, v: formula(q, k, v, [0, 40, 80], window=9, softcap=3.0))(*(x.double() for x in (q, k, v)))
    outside = attention(q, k, v, None, "loop", variant)
    assert outside.dtype == torch.bfloat16
    assert ((outside - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, None, "loop", variant), outside)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_is_unbiased_with_the_requested_rate(softcap):
    """The mean over rows that differ only in their mask, in units of its standard error, which is known exactly."""
    rate, rows_drawn, T, window = 0.3, 3000, 12, 7
    qkv, _ = draw_qkv(1, T, 4, 2, 6)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    torch.manual_seed(1)
    variant = AttentionVariant(window=window, softcap=softcap, dropout=rate)
    draws = attention(*(x.expand(rows_drawn, -1, -1, -1) for x in (q, k, v)), None, "loop", variant)

    flat = [x[0] for x in (q, k, v)]
    exact = formula(*flat, [0, T], window=window, softcap=softcap)
    identity = torch.eye(T, dtype=torch.float64)[:, None, :].expand(T, 2, T)
    wide = [torch.cat([x, x.new_zeros(*x.shape[:2], T - 6)], dim=-1) for x in flat[:2]]
    weights = formula(*wide, identity, [0, T], scale=6**-0.5, window=window, softcap=softcap)  # (T, H, T)
    values = flat[2].repeat_interleave(2, dim=1)  # (T, H, D)
    variance = rate / (1 - rate) * torch.einsum("ihj,jhd->ihd", weights**2, values**2)
    z = (draws.mean(dim=0) - exact) / (variance / rows_drawn).sqrt()
    assert z.abs().max() < 6  # 288 of them
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=0.25, atol=0.0)


def test_dropout_repeats_with_its_seed_and_its_gradient_equals_the_formula():
    T, rate, bounds = 16, 0.4, [0, 5, 16]
    qkv, grad = draw_qkv(1, T, 4, 2, T)
    variant = AttentionVariant(window=6, softcap=3.0, dropout=rate)

    def attend(q, k, v, seed=7):
        torch.manual_seed(seed)
        with mock.patch.object(plain, "QUERY_BLOCK", 4):
            return attention(q, k, v, tensor(bounds), "loop", variant)

    q, k, v = qkv.split([4, 2, 2], dim=2)
    assert torch.equal(attend(q, k, v), attend(q, k, v))
    assert not torch.equal(attend(q, k, v), attend(q, k, v, seed=8))
    # With unit vectors as values the output shows the weights, and which of them were dropped.
    unit = torch.eye(T, dtype=torch.float64)[None, :, None, :].expand(1, T, 2, T)
    keep = (attend(q, k, unit)[0] != 0).double().transpose(0, 1) / (1 - rate)  # (H, T, T)
    asked = {"window": 6, "softcap": 3.0, "keep": keep}
    expected = run(qkv, grad, [4, 2, 2], rows(lambda q, k, v: formula(q, k, v, bounds, **asked)))
    assert_equal(run(qkv, grad, [4, 2, 2], attend), expected)


# --- the cache and chunks --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    variants,
    st.none() | st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 2),
)
def test_cached_attention_equals_the_formula(S, T, variant, chunk, block, G):
    T = min(S, T)
    B, H, D = 2, 4, 6
    qkv, grad = draw_qkv(B, S, H, G, D)
    asked = {"scale": variant.scale, "window": variant.window, "softcap": variant.softcap, "chunk": chunk}
    bounds = [0, S, 2 * S]
    whole = rows(lambda q, k, v: formula(q, k, v, bounds, **asked))
    expected = run(qkv, grad[:, S - T :], [H, G, G], lambda q, k, v: whole(q, k, v)[:, S - T :])
    with mock.patch.object(plain, "QUERY_BLOCK", block):
        got = run(
            qkv, grad[:, S - T :], [H, G, G], lambda q, k, v: cached_attention(q[:, S - T :], k, v, variant, chunk)
        )
    assert_equal(got, expected)


def chunks_by_loop(bounds, B, T, chunk):
    bounds = list(range(0, B * T + 1, T)) if bounds is None else bounds
    cuts = [at for start, end in itertools.pairwise(bounds) for at in range(start, end, chunk)]
    return cuts + [B * T] * (len(bounds) + B * T // chunk - len(cuts))


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 30))
def test_chunk_boundaries_equal_a_loop(batch, chunk):
    B, T, bounds, _ = batch
    made = chunk_boundaries(tensor(bounds), B, T, chunk, "cpu")
    assert made.dtype == torch.int32
    assert made.tolist() == chunks_by_loop(bounds, B, T, chunk)
    assert made[-1] == B * T
    assert set(range(0, B * T, T)) <= set(made.tolist())


@settings(max_examples=20, deadline=None)
@given(batches(), st.integers(1, 12))
def test_chunked_attention_equals_attention_with_more_boundaries(batch, chunk):
    B, T, bounds, (H, G, D) = batch
    qkv, grad = draw_qkv(B, T, H, G, D)
    pieces = list(range(0, B * T + 1, T)) if bounds is None else bounds
    expected = run(qkv, grad, [H, G, G], rows(lambda q, k, v: formula(q, k, v, pieces, chunk=chunk)))
    cu = chunk_boundaries(tensor(bounds), B, T, chunk, "cpu")
    assert_equal(run(qkv, grad, [H, G, G], lambda q, k, v: attention(q, k, v, cu, "loop")), expected)


# --- choice of kernels -----------------------------------------------------------------------------------------------

SCALE, WINDOW = AttentionVariant(scale=0.1), AttentionVariant(window=64)
SOFTCAP, DROPOUT = AttentionVariant(softcap=50.0), AttentionVariant(dropout=0.1)


def varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):  # fmt: skip
    """FlashAttention's documented function: `window_size` counts the keys to the left and right of a query's own."""
    assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0)
    window = None if window_size[0] < 0 else window_size[0] + 1
    bounds = cu_seqlens_q.tolist()
    return formula(q, k, v, bounds, scale=softmax_scale, window=window, softcap=softcap or None)


def varlen_func_of_old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                       causal=False, deterministic=False):  # fmt: skip
    raise AssertionError("never called")


def fa4_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False, softcap=None,
             window_size_left=None, window_size_right=None, deterministic=False):  # fmt: skip
    raise AssertionError("never called")


def fa4_backward_of_old(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, cu_seqlens_q=None,
                        cu_seqlens_k=None):  # fmt: skip
    raise AssertionError("never called")


@pytest.fixture
def pretend(monkeypatch):
    """Fake a CUDA device with a compute capability and installed packages."""

    def make(capability, fa4=None, fa3=None, fa2=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        functions = {"flash_attn_interface": fa3, "flash_attn.flash_attn_interface": fa2}
        modules = {name: f and types.SimpleNamespace(flash_attn_varlen_func=f) for name, f in functions.items()}
        modules["flash_attn.cute.interface"] = fa4 and types.SimpleNamespace(
            _flash_attn_fwd=fa4[0], _flash_attn_bwd=fa4[1]
        )
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)  # None: the import fails
        choosing._choose.cache_clear()

    yield make
    choosing._choose.cache_clear()


def choose(requested="auto", documents=True, variant=PLAIN, dtype=torch.bfloat16):
    return choose_attention("cuda", dtype, 64, requested, documents=documents, variant=variant)


def test_the_table_matches_the_choice(pretend):
    """With everything installed, a requested kernel runs what the table lists, and refuses other features by name."""
    pretend((9, 0), (fa4_func, fa4_func), varlen_func, varlen_func)
    words = {"scale": "scale", "window": "sliding window", "softcap": "soft-cap", "dropout": "attention dropout"}
    for name in NAMES:
        for feature, variant in (("scale", SCALE), ("window", WINDOW), ("softcap", SOFTCAP), ("dropout", DROPOUT)):
            if feature in SERVES[name]:
                assert choose(name, name != "sdpa", variant) == (name, "requested")
            else:
                with pytest.raises(ValueError, match=f"attention '{name}' can't run here: it has no {words[feature]}"):
                    choose(name, name != "sdpa", variant)
    assert {name for name in NAMES if "dropout" in SERVES[name]} == {"fa2", "loop"}
    assert {name for name in NAMES if "softcap" in SERVES[name]} == {"fa3", "fa2", "loop", "dense"}
    assert {name for name in NAMES if "documents" not in SERVES[name]} == {"sdpa"}


FA4, NEW, OLD = (fa4_func, fa4_func), varlen_func, varlen_func_of_old
ALL = {"fa4": FA4, "fa3": NEW, "fa2": NEW}
HOPPER, BLACKWELL, CONSUMER, ADA, AMPERE, TURING = (9, 0), (10, 3), (12, 0), (8, 9), (8, 0), (7, 5)
BOTH = AttentionVariant(softcap=50.0, dropout=0.1)
WANTS_FA4 = 'the extra "hopper" would give fa4'
# capability, packages, variant, documents -> kernel, the remark in its reason ("" none)
CHOICES = [
    (HOPPER, ALL, PLAIN, True, "fa4", ""),
    (HOPPER, ALL, WINDOW, True, "fa4", ""),
    (HOPPER, ALL, SCALE, True, "fa4", ""),
    (HOPPER, ALL, PLAIN, False, "fa4", ""),
    (HOPPER, {}, PLAIN, True, "varlen", WANTS_FA4),
    (HOPPER, {}, PLAIN, False, "sdpa", WANTS_FA4),
    (HOPPER, {"fa3": NEW, "fa2": NEW}, PLAIN, True, "fa3", WANTS_FA4),
    (HOPPER, {"fa2": NEW}, WINDOW, True, "fa2", WANTS_FA4),
    (HOPPER, {"fa3": OLD, "fa2": OLD}, PLAIN, True, "fa3", WANTS_FA4),
    (HOPPER, {"fa4": FA4, "fa3": OLD}, WINDOW, True, "fa4", ""),
    (
        *(HOPPER, {"fa3": OLD, "fa2": OLD}, WINDOW, True, "varlen"),
        f"not fa3 or fa2: this release has no sliding window; {WANTS_FA4}",
    ),
    (HOPPER, {"fa3": OLD}, WINDOW, False, "varlen", "not sdpa: it has no sliding window; not fa3: this release has no"),
    (HOPPER, ALL, SOFTCAP, True, "fa3", "not fa4: it has no soft-cap"),
    (HOPPER, {"fa4": FA4, "fa2": NEW}, SOFTCAP, False, "fa2", "not fa4 or sdpa: it has no soft-cap"),
    (
        *(HOPPER, {"fa4": FA4}, SOFTCAP, True, "loop"),
        'not fa4 or varlen: it has no soft-cap; the extra "flash" would give fa2',
    ),
    (HOPPER, ALL, DROPOUT, True, "fa2", "not fa4 or fa3: it has no attention dropout"),
    (HOPPER, ALL, BOTH, True, "loop", "not fa2: it has no soft-cap together with attention dropout"),
    (BLACKWELL, ALL, PLAIN, True, "fa4", ""),
    (BLACKWELL, {"fa3": NEW, "fa2": NEW}, PLAIN, True, "fa2", WANTS_FA4),
    (BLACKWELL, {}, PLAIN, True, "varlen", WANTS_FA4),
    (BLACKWELL, {"fa4": (fa4_func, fa4_backward_of_old)}, PLAIN, True, "fa4", ""),
    # FA4's backward supported windows later than its forward.
    (
        *(BLACKWELL, {"fa4": (fa4_func, fa4_backward_of_old)}, WINDOW, True, "varlen"),
        "not fa4: this release has no sliding window",
    ),
    (CONSUMER, ALL, PLAIN, True, "fa2", ""),
    (ADA, {}, PLAIN, True, "varlen", ""),
    (AMPERE, ALL, PLAIN, True, "fa2", ""),
    (AMPERE, ALL, PLAIN, False, "sdpa", ""),
    (AMPERE, {}, SOFTCAP, True, "loop", 'not varlen: it has no soft-cap; the extra "flash" would give fa2'),
    (TURING, ALL, PLAIN, True, "loop", "not varlen: it doesn't support compute capability 7.5"),
    (TURING, {}, PLAIN, False, "sdpa", ""),
]


@pytest.mark.parametrize(("capability", "installed", "variant", "documents", "name", "remark"), CHOICES)
def test_auto_takes_the_fastest_kernel_in_one_line(pretend, capability, installed, variant, documents, name, remark):
    """GPU x packages and their releases x features: the choice, and a remark only where it is of use."""
    pretend(capability, **installed)
    choice = choose(documents=documents, variant=variant)
    assert choice.name == name
    assert remark in choice.reason and "\n" not in choice.reason and len(choice.reason) < 280
    assert ("(" in choice.reason) == bool(remark)


def test_the_choice_by_dtype_and_head_size(pretend):
    pretend(HOPPER, **ALL)
    fp32 = choose(dtype=torch.float32)
    assert fp32.name == "loop" and fp32.reason.endswith("(not varlen: it needs bfloat16 or float16, not float32)")
    assert choose(documents=False, variant=DROPOUT, dtype=torch.float32).name == "loop"
    assert choose_attention("cuda", torch.bfloat16, 256).name == "fa3"
    assert choose_attention("cuda", torch.bfloat16, 12).name == "loop"


def test_a_broken_package_is_reported_and_passed_over(pretend, tmp_path, monkeypatch):
    """FA4 installed without one of its dependencies, or from a release without the functions used here."""
    pretend(HOPPER)
    monkeypatch.delitem(sys.modules, "flash_attn.cute.interface")
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "interface.py").write_text("import a_missing_compiler\n")
    monkeypatch.syspath_prepend(tmp_path)
    choice = choose()
    assert choice.name == "varlen" and "would give" not in choice.reason
    text = "not fa4: it is installed but does not import (ModuleNotFoundError: No module named 'a_missing_compiler')"
    assert text in choice.reason
    pretend(HOPPER, fa4=FA4)
    monkeypatch.delattr(sys.modules["flash_attn.cute.interface"], "_flash_attn_bwd")
    assert "not fa4: this release has no _flash_attn_bwd" in choose().reason


def test_a_requested_kernel_names_its_package(pretend):
    pretend(HOPPER)
    with pytest.raises(ValueError, match=r'flash_attn.cute.interface is not installed \(the extra "hopper", docs/inst'):
        choose("fa4")
    with pytest.raises(ValueError, match="flash_attn_interface is not installed; choose another"):
        choose("fa3")
    pretend(HOPPER, **ALL)
    with pytest.raises(ValueError, match="soft-cap together"):
        choose("fa2", variant=BOTH)
    pretend(BLACKWELL, fa4=(fa4_func, fa4_backward_of_old))
    with pytest.raises(ValueError, match="this release has no sliding window"):
        choose("fa4", variant=WINDOW)


def test_torch_without_a_window(pretend, monkeypatch):
    pretend(AMPERE)
    monkeypatch.setattr(cuda, "VARLEN_ARGUMENTS", frozenset({"cu_seq_q", "is_causal"}))
    assert choose().name == "varlen"
    for variant, lacking in ((SCALE, "scale"), (WINDOW, "sliding window")):
        choice = choose(variant=variant)
        assert choice.name == "loop" and f"varlen: this release has no {lacking}" in choice.reason
    monkeypatch.setattr(cuda, "VARLEN_ARGUMENTS", frozenset())
    choosing._choose.cache_clear()
    assert choose().name == "loop"


def test_the_choice_on_a_cpu_is_reported():
    choice = choose_attention("cpu", torch.float32, 64, variant=AttentionVariant(window=8, dropout=0.1))
    assert choice == ("loop", "cpu: pieces one by one, sliding window and attention dropout in blocks of queries")
    with pytest.raises(ValueError, match="'dense' can't run here: it has no attention dropout"):
        choose_attention("cpu", torch.float32, 64, "dense", variant=DROPOUT)


def test_attention_refuses_unsupported_features():
    q, k, v = draw_qkv(1, 100, 2, 2, 4)[0].split([2, 2, 2], dim=2)
    for name, variant in (
        ("dense", DROPOUT),
        ("fa3", DROPOUT),
        ("varlen", SOFTCAP),
        ("sdpa", WINDOW),
        ("fa4", SOFTCAP),
    ):
        with pytest.raises(ValueError, match=f"attention '{name}' can't run here: it has no"):
            attention(q, k, v, None, name, variant)


@pytest.mark.parametrize(
    "variant", [PLAIN, SCALE, AttentionVariant(window=1), AttentionVariant(window=5), SOFTCAP], ids=str
)
@pytest.mark.parametrize("name", ["fa3", "fa2", "varlen"])
def test_kernels_get_the_variants_arguments(monkeypatch, name, variant):
    """Kernels replaced by functions with the documented meaning of their arguments."""
    if not SERVES[name].keys() >= set(variant.features()):
        pytest.skip(f"{name} doesn't do {variant}")

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and window_size[1] == 0 and torch.equal(cu_seq_q, cu_seq_k)
        window = None if window_size[0] < 0 else window_size[0] + 1
        return formula(q, k, v, cu_seq_q.tolist(), scale=scale, window=window)

    module = types.SimpleNamespace(flash_attn_varlen_func=varlen_func, varlen_attn=varlen_attn)
    for path in ("flash_attn", "flash_attn_interface", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(cuda, "VARLEN_ARGUMENTS", frozenset({"scale", "window_size", "enable_gqa"}))
    qkv, _ = draw_qkv(2, 12, 4, 2, 6)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    asked = {"scale": variant.scale, "window": variant.window, "softcap": variant.softcap}
    for bounds in (None, [0, 3, 12, 24, 24]):
        expected = rows(lambda q, k, v, b=bounds: formula(q, k, v, b or [0, 12, 24], **asked))(q, k, v)
        torch.testing.assert_close(attention(q, k, v, tensor(bounds), name, variant), expected)


def test_fa4_gets_the_variants_arguments():
    assert cuda.options("fa4", AttentionVariant(0.2, 8)) == {"softmax_scale": 0.2, "window_size_left": 7}
    assert cuda.options("fa4", PLAIN) == {}


def test_the_arguments_of_torchs_kernel_are_found_without_importing_it() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert cuda.varlen_arguments() == set(inspect.signature(varlen_attn).parameters)
