"""The graph that is exported to ONNX computes what the model does: in one call, in parts with a cache, with padding."""

import pytest
import torch
from hf_checks import build, draw_tokens
from small_models import EVERY_FAMILY, SIZES

from lit_model.config import ModelConfig
from lit_model.hf.families import family_of
from lit_model.onnx_graph import OnnxGraph


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_every_family(family):
    config = ModelConfig(**SIZES, **EVERY_FAMILY[family], vocab_size=100)
    assert family_of(config).model_type == family
    model = build(config)
    B, T = 3, 40
    tokens = draw_tokens(config, B, T)
    wanted, mask = model(tokens), torch.ones(B, T, dtype=torch.long)
    close = {"rtol": 1e-5, "atol": 1e-5}
    (logits,) = OnnxGraph(model, cache=False)(tokens, mask)
    torch.testing.assert_close(logits, wanted, **close)
    graph = OnnxGraph(model, cache=True)
    assert len(graph.input_names) == 2 + 2 * config.n_layer and graph.output_names[-1] == "present.1.value"
    shape = (B, config.n_query_groups, 0, config.head_size)
    past, end, parts = [torch.zeros(shape) for _ in graph.input_names[2:]], 0, []
    for n in (1, 17, 1, 21):
        end += n
        logits, *past = graph(tokens[:, end - n : end], mask[:, :end], past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, **close)
    # Rows that begin later, behind padding.
    mask[1, :5] = mask[2, :39] = 0
    logits = OnnxGraph(model, cache=False)(tokens, mask)[0]
    assert logits.isfinite().all()
    for row, first in ((0, 0), (1, 5), (2, 39)):
        torch.testing.assert_close(logits[row, first:], model(tokens[row : row + 1, first:])[0], **close)
    assert torch.equal(model(tokens), wanted)  # the model itself is unchanged
