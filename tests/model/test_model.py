"""Properties of the model: packing, recomputation, precision, compile, caches."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lit_model.config import RopeScaling
from lit_model.init import initialise
from lit_model.loss import IGNORE_INDEX, LossOutput
from lit_model.model import GPT
from lit_model.norm import RMSNorm
from lit_model.registry import get_config
from lit_model.rope import apply_rope, positions_in_pieces, rope_frequencies

CONFIG = get_config("debug", vocab_size=500, attention_bias=True)
# Two rows of 32 tokens: pieces of 5, 1, 20 and 6 tokens, and of 32; padded at the end.
BOUNDS = [0, 5, 6, 26, 32, 64, 64, 64]
B, T = 2, 32


def build(config=CONFIG, dtype=torch.float32, **kwargs):
    model = GPT(config, **kwargs)
    initialise(model, config, seed=3)
    return model.to(dtype)


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (B, T), generator=generator)
    targets = torch.randint(0, CONFIG.vocab_size, (B, T), generator=generator)
    targets[0, [4, 5, 25]] = IGNORE_INDEX
    targets[1, 31] = IGNORE_INDEX
    return tokens, targets, torch.tensor(BOUNDS, dtype=torch.int32)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kwargs", [{}, {"attention": "dense"}, {"activation_checkpointing": "full"}], ids=str)
def test_packed_batch_equals_documents_one_at_a_time(kwargs):
    tokens, targets, cu = batch()
    packed = build(dtype=torch.float64, **kwargs)
    out = packed(tokens, targets, cu_seqlens=cu)
    out.loss_sum.backward()
    single = build(dtype=torch.float64)
    losses = []
    for start, stop in itertools.pairwise(BOUNDS):
        piece = slice(start, stop)
        one = single(tokens.flatten()[None, piece], targets.flatten()[None, piece])
        one.loss_sum.backward()
        losses.append(one.token_losses.flatten())
    torch.testing.assert_close(out.token_losses.flatten(), torch.cat(losses), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.loss_sum.detach(), torch.cat(losses).sum(), rtol=1e-13, atol=0)
    for name, want in gradients(single).items():
        torch.testing.assert_close(gradients(packed)[name], want, rtol=1e-10, atol=1e-11, msg=name)


def test_documents_do_not_see_each_other():
    tokens, _, cu = batch()
    model = build()
    with torch.no_grad():
        logits = model(tokens, cu_seqlens=cu)
        other = tokens.clone()
        other[0, 6:26] = (other[0, 6:26] + 1) % CONFIG.vocab_size  # the third piece
        changed = model(other, cu_seqlens=cu)
    same = (logits == changed).all(-1).flatten()
    assert same[:6].all() and same[26:].all() and not same[6:26].any()


def test_losses_equal_cross_entropy_of_the_logits():
    tokens, targets, cu = batch()
    model = build()
    out = model(tokens, targets, cu_seqlens=cu)
    logits = model(tokens, cu_seqlens=cu)
    assert isinstance(out, LossOutput) and logits.shape == (B, T, CONFIG.vocab_size)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(out.token_losses.flatten(), want, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_in_eval_and_repeats_under_recomputation():
    config = get_config("debug", dropout=0.2)
    tokens, targets, cu = batch()
    plain, recomputed = build(config), build(config, activation_checkpointing="full")
    for model in (plain, recomputed):
        torch.manual_seed(5)
        model(tokens, targets, cu_seqlens=cu).loss_sum.backward()
    for name, want in gradients(plain).items():
        assert torch.equal(gradients(recomputed)[name], want), name
    with torch.no_grad():
        assert not torch.equal(plain(tokens), plain(tokens))
        plain.eval()
        assert torch.equal(plain(tokens), plain(tokens))
        reference = build(get_config("debug"))
        assert torch.equal(plain(tokens), reference(tokens))


def test_autocast_and_bfloat16_parameters_stay_close_to_float32():
    tokens, targets, cu = batch()
    exact = build(dtype=torch.float64)
    exact(tokens, targets, cu_seqlens=cu).loss_sum.backward()
    auto = build()
    with torch.autocast("cpu", torch.bfloat16):
        out = auto(tokens, targets, cu_seqlens=cu)
    out.loss_sum.backward()
    low = build(dtype=torch.bfloat16)
    low_out = low(tokens, targets, cu_seqlens=cu)
    low_out.loss_sum.backward()
    # The reference: the same model in bfloat16 with attention by definition.
    own = build(dtype=torch.bfloat16, attention="dense")
    own(tokens, targets, cu_seqlens=cu).loss_sum.backward()
    assert out.loss_sum.dtype == low_out.loss_sum.dtype == torch.float32
    for name, want in gradients(exact).items():
        allowed = 2 * (gradients(own)[name] - want).norm()
        assert (gradients(auto)[name] - want).norm() <= allowed, name
        assert (gradients(low)[name] - want).norm() <= allowed, name
        assert gradients(auto)[name].dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_equal_eager():
    """One graph per block, without graph breaks at document boundaries. This backend only traces, without a C++
    compiler.
    """
    tokens, targets, cu = batch()
    eager, compiled = build(), build()
    for block in compiled.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    for packing in (cu, torch.tensor([0, 32, 50, 64, 64, 64, 64, 64], dtype=torch.int32)):
        for model in (eager, compiled):
            model.zero_grad()
            model(tokens, targets, cu_seqlens=packing).loss_sum.backward()
        for name, want in gradients(eager).items():
            torch.testing.assert_close(gradients(compiled)[name], want, rtol=1e-4, atol=1e-4, msg=name)


def test_built_on_meta_and_materialised():
    with torch.device("meta"):
        model = GPT(CONFIG)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="transformer.wte.weight is on the meta device"):
        initialise(model, CONFIG, 3)
    model.to_empty(device="cpu")
    initialise(model, CONFIG, 3)
    tokens, _, cu = batch()
    with torch.no_grad():
        assert torch.equal(model(tokens, cu_seqlens=cu), build()(tokens, cu_seqlens=cu))


def test_inference_mode_first_then_training():
    """RoPE tables created under inference_mode must work in a later backward."""
    tokens, targets, cu = batch()
    model = build()
    with torch.inference_mode():
        model(tokens, cu_seqlens=cu)
    model(tokens, targets, cu_seqlens=cu).loss_sum.backward()
    model(tokens, targets).loss_sum.backward()


def test_tied_head_is_one_parameter():
    config = get_config("debug", tie_embeddings=True)
    model = build(config)
    assert "lm_head.weight" not in model.state_dict() and model.head_weight is model.transformer["wte"].weight


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="257 tokens exceed the model's context .block_size 256"):
        build()(torch.zeros(1, 257, dtype=torch.int64))


def test_positions_restart_at_each_boundary():
    cu = torch.tensor([0, 3, 3, 4, 9, 9], dtype=torch.int32)
    assert positions_in_pieces(cu, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def test_rotation_equals_a_complex_product_and_its_backward_the_inverse():
    """Compared with complex numbers: (a + ib) e^(i angle), on the first heads only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, 8, generator=generator, dtype=torch.float64)
    angles = torch.rand(2, 7, 1, 4, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    turn = torch.complex(cos.double(), sin.double())

    def reference(x):
        turned = torch.complex(*x[:, :, :3].chunk(2, -1)) * turn
        return torch.cat((torch.cat((turned.real, turned.imag), -1), x[:, :, 3:]), 2)

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        ours = x.to(dtype, copy=True).requires_grad_()
        theirs = ours.detach().to(torch.float64, copy=True).requires_grad_()
        y, want = apply_rope(ours.clone(), cos, sin, 3), reference(theirs)
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
        grad = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
        y.backward(grad)
        want.backward(grad.double())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)
        compiled = torch.compile(apply_rope, backend="eager", fullgraph=True)(x.to(dtype), cos, sin, 3)
        torch.testing.assert_close(compiled, y.detach(), rtol=1e-6, atol=1e-6)


def test_frequencies_at_the_boundaries_of_the_scaling():
    """Short wavelengths are unchanged, long ones divided by the factor, intermediate ones follow the formula."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192)
    config = get_config("nano-llama", rope_scaling=scaling, head_size=128)
    scaled = rope_frequencies(config)
    plain = rope_frequencies(get_config("nano-llama", rope_scaling=None, head_size=128))
    ratio = (plain / scaled).double()
    wavelength = 2 * torch.pi / plain.double()
    short, long = wavelength < 8192 / 4, wavelength > 8192
    between = ~short & ~long
    assert (ratio[short] == 1).all() and (ratio[long] == 8).all() and between.sum() > 3
    mix = (8192 / wavelength[between] - 1) / 3
    torch.testing.assert_close(1 / ratio[between], (1 - mix) / 8 + mix, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norm_equals_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 48, generator=generator).to(dtype).requires_grad_()
    norm = RMSNorm(48, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.add_(torch.randn(48, generator=generator).to(dtype))
    grad = torch.randn(3, 5, 48, generator=generator).to(dtype)
    y = norm(x)
    y.backward(grad)
    exact_x, exact_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = F.rms_norm(exact_x, (48,), exact_w, 1e-5)
    exact.backward(grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for got, want in ((y, exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_w.grad)):
        assert (got.double() - want).norm() <= tolerance * want.norm()
