"""OLMo 2 against transformers: norms behind the branches, and over whole projections."""

from hf_checks import family_tests, scalings, sizes, transformers
from hypothesis import strategies as st

from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf


@st.composite
def configs(draw):
    return ModelConfig(
        **draw(sizes()),
        rope_base=draw(st.sampled_from([10000.0, 500000.0])),
        rope_scaling=draw(scalings),
        attention_bias=draw(st.booleans()),
        qk_norm="projection",
        pre_norm=False,
        post_norm=True,
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "olmo2")


def test_defaults_are_those_of_transformers():
    minimal = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    minimal.update(model_type="olmo2", vocab_size=100)
    ours, theirs = config_from_hf(minimal), transformers.AutoConfig.for_model(**minimal)
    assert (ours.n_query_groups, ours.head_size) == (4, 16)
    assert (ours.block_size, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours == config_from_hf({**theirs.to_dict(), "architectures": None})
