"""Every attention implementation, compared with the definition in float64 on packed grouped-query batches."""

import pytest
import torch

from lit_model.kernels.choose import attention, choose_attention
from lit_model.kernels.plain import dense_attention, plain_loop
from lit_model.kernels.variant import PLAIN, SERVES, AttentionVariant

# (B, T, boundaries): unequal pieces, pieces of one token, whole rows, equal neighbours, padded boundaries
PACKINGS = {
    "unequal": (2, 48, [0, 5, 6, 31, 48, 50, 96]),
    "whole rows": (3, 32, [0, 32, 64, 96]),
    "equal neighbours": (2, 48, [0, 12, 24, 36, 48, 49, 96]),
    "padded": (2, 33, [0, 20, 33, 66, 66, 66]),
}
HEADS = [(4, 4, 16), (6, 2, 24), (3, 1, 40), (8, 2, 64)]


def draw(B, T, H, G, D, dtype, device="cpu", seed=0):
    """Views into one fused projection, as in the model, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, H + 2 * G, D, generator=generator, dtype=torch.float64).to(device, dtype)
    grad = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64).to(device, dtype)
    return qkv, grad, [H, G, G]


def run(qkv, grad, heads, attend):
    qkv = qkv.detach().clone().requires_grad_()
    y = attend(*qkv.split(heads, dim=2))
    y.backward(grad)
    return y.detach(), qkv.grad


def check(name, dtype, heads, packing, device="cpu", variant=PLAIN):
    B, T, bounds = packing
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    qkv, grad, split = draw(B, T, *heads, dtype, device)
    y, g = run(qkv, grad, split, lambda q, k, v: attention(q, k, v, cu, name, variant))
    exact_y, exact_g = run(qkv.double(), grad.double(), split, lambda q, k, v: dense_attention(q, k, v, cu, variant))
    assert y.dtype == dtype and y.shape == exact_y.shape
    if dtype == torch.float64:
        torch.testing.assert_close(y, exact_y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(g, exact_g, rtol=1e-11, atol=1e-11)
        return
    # The bound is the reference's own error in this precision; the factor 2 allows another order of summation, and the
    # second term covers batches where the reference happens to be exact.
    own_y, own_g = run(qkv, grad, split, lambda q, k, v: dense_attention(q, k, v, cu, variant))
    for got, own, exact in ((y, own_y, exact_y), (g, own_g, exact_g)):
        bound = 2 * (own - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (got - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_loop_equals_definition(dtype, heads, packing):
    check("loop", dtype, heads, PACKINGS[packing])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_without_documents(dtype):
    for name in ("loop", "sdpa"):
        check(name, dtype, (6, 2, 24), (3, 40, None))


def test_loop_of_other_devices():
    """The code used where no variable-length kernel runs (float32 on CUDA, MPS), here on the CPU."""
    B, T, bounds = PACKINGS["padded"]
    cu = torch.tensor(bounds, dtype=torch.int32)
    qkv, grad, split = draw(B, T, 6, 2, 24, torch.float64)
    y, g = run(qkv, grad, split, lambda q, k, v: plain_loop(q, k, v, cu, *PLAIN))
    exact_y, exact_g = run(qkv, grad, split, lambda q, k, v: dense_attention(q, k, v, cu))
    torch.testing.assert_close(y, exact_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g, exact_g, rtol=1e-11, atol=1e-11)


def test_definition_equals_softmax_written_out():
    """The reference itself, compared with a loop over tokens."""
    qkv, _, split = draw(1, 7, 4, 2, 6, torch.float64)
    q, k, v = qkv.split(split, dim=2)
    bounds = [0, 3, 7]
    y = dense_attention(q, k, v, torch.tensor(bounds, dtype=torch.int32))
    for t in range(7):
        start = max(b for b in bounds if b <= t)
        for h in range(4):
            g = h // 2
            scores = torch.stack([q[0, t, h] @ k[0, s, g] / 6**0.5 for s in range(start, t + 1)])
            expected = (scores.softmax(0)[:, None] * v[0, start : t + 1, g]).sum(0)
            torch.testing.assert_close(y[0, t, h], expected)


def test_operator_is_registered_properly():
    """Schema, fake implementation and autograd agree with what the operator does (torch's own checker)."""
    qkv, _, split = draw(1, 20, 4, 2, 8, torch.float32)
    q, k, v = (x.flatten(0, 1).requires_grad_() for x in qkv.split(split, dim=2))
    cu = torch.tensor([0, 5, 20], dtype=torch.int32)
    torch.library.opcheck(torch.ops.llammlein.attention_loop.default, (q, k, v, cu, 0.2))


def test_the_choice_gives_its_reason():
    choice = choose_attention("cpu", torch.float32, 64)
    assert choice.name == "loop" and choice.reason
    assert choose_attention("cpu", torch.float32, 64, "dense") == ("dense", "requested")
    with pytest.raises(ValueError, match="'fa2' can't run here: it needs CUDA"):
        choose_attention("cpu", torch.bfloat16, 64, "fa2")
    with pytest.raises(ValueError, match="can't keep documents apart"):
        choose_attention("cpu", torch.float32, 64, "sdpa", documents=True)
    with pytest.raises(ValueError, match="unknown; choose auto or one of fa4"):
        choose_attention("cpu", torch.float32, 64, "flash")


def test_sdpa_refuses_documents():
    qkv, _, split = draw(1, 8, 2, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="documents apart"):
        attention(*qkv.split(split, dim=2), torch.tensor([0, 4, 8], dtype=torch.int32), "sdpa")


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


def skip_unless_it_runs(name, device, dtype, head_size, documents=True, variant=PLAIN):
    try:
        choose_attention(device, dtype, head_size, name, documents=documents, variant=variant)
    except ValueError as error:
        pytest.skip(str(error))


LONG = (2, 512, [0, 5, 6, 300, 512, 900, 1024, 1024, 1024])
CUDA_HEADS = [(8, 2, 64), (8, 8, 64), (8, 2, 128), (8, 8, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", CUDA_HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "varlen", "loop"])
def test_cuda_packed(cuda, name, dtype, heads):
    skip_unless_it_runs(name, cuda, dtype, heads[2])
    check(name, dtype, heads, LONG, cuda)


VARIANTS = [
    AttentionVariant(scale=0.2),
    AttentionVariant(window=37),
    AttentionVariant(window=1),
    AttentionVariant(softcap=2.0),
    AttentionVariant(scale=0.2, window=300, softcap=2.0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 2, 128)], ids=str)
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", sorted(SERVES.keys() - {"dense"}))
def test_cuda_variants(cuda, name, variant, documents, heads):
    skip_unless_it_runs(name, cuda, torch.bfloat16, heads[2], documents, variant)
    check(name, torch.bfloat16, heads, LONG if documents else (2, 512, None), cuda, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "varlen"])
def test_cuda_at_the_shape_of_a_run(cuda, name, window):
    """Rows of 2048 tokens, documents of about 400, boundaries padded as the loader pads them, in bf16."""
    variant = AttentionVariant(window=window)
    skip_unless_it_runs(name, cuda, torch.bfloat16, 64, variant=variant)
    bounds = [0, 380, 800, 1250, 1600, 2048, 2500, 2501, 3700, 4096] + [4096] * 6
    check(name, torch.bfloat16, (8, 2, 64), (2, 2048, bounds), cuda, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa2", "loop"])
def test_cuda_dropout_is_unbiased(cuda, name):
    """The mean over 4096 equal rows, each with its own mask, compared with no dropout."""
    variant = AttentionVariant(dropout=0.25)
    skip_unless_it_runs(name, cuda, torch.bfloat16, 64, variant=variant)
    qkv, _, split = draw(1, 16, 4, 2, 64, torch.bfloat16, cuda)
    q, k, v = qkv.expand(4096, -1, -1, -1).split(split, dim=2)
    cu = torch.arange(0, 4097 * 16, 16, dtype=torch.int32, device=cuda)
    draws = attention(q, k, v, cu, name, variant).double()
    exact = dense_attention(*qkv.double().split(split, dim=2), None)[0]
    # 6 standard errors, plus bfloat16's rounding of each row
    bound = 6 * draws.std(dim=0) / 64 + 2 * torch.finfo(torch.bfloat16).eps * draws.abs().amax(dim=0)
    assert ((draws.mean(dim=0) - exact).abs() <= bound).all()
    assert draws.std(dim=0).min() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "varlen", "sdpa"])
def test_cuda_rows(cuda, name, dtype):
    skip_unless_it_runs(name, cuda, dtype, 64, documents=False)
    check(name, dtype, (8, 2, 64), (2, 512, None), cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "varlen"])
def test_cuda_deterministic_backward_repeats(cuda, name):
    torch.use_deterministic_algorithms(True)
    try:
        skip_unless_it_runs(name, cuda, torch.bfloat16, 64)
        B, T, bounds = LONG
        cu = torch.tensor(bounds, dtype=torch.int32, device=cuda)
        qkv, grad, split = draw(B, T, 8, 2, 64, torch.bfloat16, cuda)
        runs = [run(qkv, grad, split, lambda q, k, v: attention(q, k, v, cu, name)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(g, runs[0][1]) for _, g in runs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2", "varlen"])
def test_cuda_compiles_in_one_graph(cuda, name):
    skip_unless_it_runs(name, cuda, torch.bfloat16, 64)
    B, T, bounds = LONG
    cu = torch.tensor(bounds, dtype=torch.int32, device=cuda)
    qkv, grad, split = draw(B, T, 8, 2, 64, torch.bfloat16, cuda)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, cu, name), fullgraph=True)
    y, g = run(qkv, grad, split, compiled)
    exact_y, exact_g = run(qkv, grad, split, lambda q, k, v: attention(q, k, v, cu, name))
    torch.testing.assert_close(y, exact_y)
    torch.testing.assert_close(g, exact_g, rtol=2e-2, atol=2e-2)
