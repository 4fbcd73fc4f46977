"""The transforms of tensors between our names and Hugging Face's: exact inverses, and what they mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.fields import Fields, rope_from_hf, rope_to_hf
from lit_model.hf.table import SAME, TRANSPOSED, Rows, head_by_head, interleaved

H, G, D, R, C = 4, 2, 6, 4, 5
TRANSFORMS = {
    "same": (SAME, (7, C)),
    "rows": (Rows((H * D, G * D, G * D)), ((H + 2 * G) * D, C)),
    "transposed": (TRANSPOSED, (7, C)),
    "experts": (TRANSPOSED, (3, 7, C)),
    "head by head": (head_by_head(H), (3 * H * D, C)),
    "interleaved": (interleaved(H, R), (H * D, C)),
    "whole head": (interleaved(H, D), (H * D, C)),
    "rows, interleaved": (
        Rows((H * D, G * D, G * D), (interleaved(H, R), interleaved(G, R), SAME)),
        ((H + 2 * G) * D, C),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_are_exact_inverses_for_weights_biases_and_layouts(name):
    transform, shape = TRANSFORMS[name]
    shapes = [shape, shape[:1]] if len(shape) == 2 else [shape]
    for shape in shapes:
        ours = torch.arange(torch.Size(shape).numel()).view(shape)
        theirs = transform.to_theirs(ours)
        back = transform.to_ours(theirs)
        assert torch.equal(back, ours) and back.is_contiguous()
        assert sorted(torch.cat([part.flatten() for part in theirs]).tolist()) == list(range(ours.numel()))
        again = transform.to_theirs(transform.to_ours([part.contiguous() for part in theirs]))
        assert all(torch.equal(a, b) for a, b in zip(again, theirs, strict=True))
        layout = transform.to_theirs(torch.empty(shape, device="meta"))
        assert [part.shape for part in layout] == [part.shape for part in theirs]
        assert all(part.is_meta for part in layout)


def test_head_by_head_puts_each_heads_queries_keys_and_values_together():
    q, k, v = torch.arange(3 * H * D).split(H * D)
    (theirs,) = head_by_head(H).to_theirs(torch.cat((q, k, v)))
    for head, rows in enumerate(theirs.split(3 * D)):
        one = slice(head * D, (head + 1) * D)
        assert torch.equal(rows, torch.cat((q[one], k[one], v[one])))


def test_interleaved_gives_the_same_scores_under_the_other_rotation():
    generator = torch.Generator().manual_seed(0)
    x, y, wq, wk = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((C,), (C,), (D, C), (D, C)))
    angles = {"x": 3 * torch.tensor([1.0, 0.3], dtype=torch.float64), "y": torch.tensor([1.0, 0.3]).double()}

    def halves(z, angle):  # dimension i with i + R/2
        a, b, rest = z[: R // 2], z[R // 2 : R], z[R:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest))

    def pairs(z, angle):  # dimension 2i with 2i + 1
        z = z.clone()
        for i in range(R // 2):
            turn = torch.polar(torch.ones(()).double(), angle[i]) * torch.complex(z[2 * i], z[2 * i + 1])
            z[2 * i], z[2 * i + 1] = turn.real, turn.imag
        return z

    ours = halves(wq @ x, angles["x"]) @ halves(wk @ y, angles["y"])
    (tq,), (tk,) = (interleaved(1, R).to_theirs(w) for w in (wq, wk))
    torch.testing.assert_close(pairs(tq @ x, angles["x"]) @ pairs(tk @ y, angles["y"]), ours, rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 128).flatmap(lambda half: st.tuples(st.just(2 * half), st.integers(1, half))))
def test_partial_rotation_survives_its_fraction(sizes):
    head_size, half = sizes
    config = ModelConfig(n_head=1, n_embd=head_size, rotary_size=2 * half)
    rope = rope_from_hf(Fields(rope_to_hf(config, partial=True)), block_size=64, fraction=0.25)
    assert rope.rotary_size(head_size) == 2 * half


def test_rope_keys_of_another_name():
    hf = Fields({"rotary_emb_base": 500, "rotary_pct": 0.5})
    rope = rope_from_hf(hf, block_size=64, fraction=0.25, base_key="rotary_emb_base", fraction_key="rotary_pct")
    assert (rope.base, rope.fraction) == (500.0, 0.5)
    hf.finish()
    assert rope_from_hf(Fields({}), block_size=64, base=5e5, fraction=0.25)[::2] == (5e5, 0.25)
