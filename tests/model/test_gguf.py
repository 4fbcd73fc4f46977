"""GGUF files as opened by transformers' reader: logits, and the ids of texts."""

import dataclasses
import io

import pytest
import torch
from hf_checks import build, draw_tokens, transformers
from running import script

from lit_data.tokenizers.gguf import LLAMA_CPP_NAMES, PRE_TOKENIZERS, gguf_tokenizer
from lit_data.tokenizers.hf_export import HARD_STRINGS
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_model.config import ModelConfig, RopeScaling
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.gguf import write_gguf
from lit_model.hf.io import write_folder
from lit_model.rope import rope_frequencies
from pretrain.convert.export import export_to_gguf

gguf = pytest.importorskip("gguf")

SIZES = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 48, "block_size": 64, "vocab_size": 100}
CONFIGS = {
    "llama": ModelConfig(**SIZES),
    "tied, with biases": ModelConfig(**SIZES, tie_embeddings=True, attention_bias=True, mlp_bias=True),
    "wide window": ModelConfig(**SIZES, attention_pattern=("sliding",), sliding_window_size=64),
    # A head size of 128, since transformers' reader of GGUF takes no other for qwen3.
    "qwen3": ModelConfig(**SIZES, qk_norm="head", tie_embeddings=True, head_size=128),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_model(name, dtype, tmp_path):
    config = dataclasses.replace(CONFIGS[name], name=f"a {name}")
    model = build(config)
    if dtype != "float32":  # within that precision
        for p in model.parameters():
            if p.dim() > 1:
                p.data = p.data.to(getattr(torch, dtype)).float()
    write_gguf(tmp_path / "model.gguf", config, model.state_dict(), dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert reader.get_field("general.architecture").contents() == ("qwen3" if name == "qwen3" else "llama")
    assert stored["token_embd.weight"].shape == (100, 48)
    if config.attention_bias:
        # transformers decides about biases by its config, for which GGUF has no key, so tensors are compared one by
        # one.
        names = {n.removesuffix(".bias") for n in stored if n.endswith(".bias")}
        assert names == {
            f"blk.{i}.{n}"
            for i in range(2)
            for n in "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()  # noqa: SIM905
        }
        bias = model.state_dict()["transformer.h.1.attn.qkv.bias"]
        v, q = torch.tensor(stored["blk.1.attn_v.bias"]), torch.tensor(stored["blk.1.attn_q.bias"])
        assert torch.equal(v, bias[-24:]) and torch.equal(q.view(4, 6, 2).mT.reshape(-1), bias[:48])
        return
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = draw_tokens(config)
    with torch.no_grad():
        torch.testing.assert_close(hf.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    assert hf.config.max_position_embeddings == 64 and hf.config.tie_word_embeddings == config.tie_embeddings


def test_q8_0_is_within_half_a_step(tmp_path):
    """Blocks of 32 numbers x are stored as d = max|x| / 127 in float16 and round(x / d) in 8 bits."""
    config = ModelConfig(**{**SIZES, "n_embd": 64}, intermediate_size=96)
    model = build(config)
    for dtype in ("float32", "q8_0"):
        write_gguf(tmp_path / f"{dtype}.gguf", config, model.state_dict(), dtype=dtype)
    exact, stored = (
        {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("float32.gguf", "q8_0.gguf")
    )
    assert exact.keys() == stored.keys()
    for name, x in exact.items():
        if x.dim() == 1:
            assert torch.equal(stored[name], x)
            continue
        blocks = x.double().unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        error = (stored[name].double().unflatten(-1, (-1, 32)) - blocks).abs()
        assert (error <= step * (0.5 + 127 * 2**-11) + 2**-24).all() and error.max() > 0, name  # d has 11 bits
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q8_0.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits, wanted = hf(draw_tokens(config)).logits, model(draw_tokens(config))
    assert 0 < (logits - wanted).norm() / wanted.norm() < 0.03
    with pytest.raises(ValueError, match="q8_0: token_embd.weight has rows of 48 numbers, not a multiple of 32"):
        write_gguf(tmp_path / "odd.gguf", CONFIGS["llama"], {}, dtype="q8_0")


def test_scaled_rotation_becomes_divisors_of_the_frequencies(tmp_path):
    config = ModelConfig(**SIZES, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
    write_gguf(tmp_path / "model.gguf", config, build(config).state_dict())
    stored = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    plain = config.rope_base ** -(torch.arange(6) / 6)
    torch.testing.assert_close(plain / stored["rope_freqs.weight"], rope_frequencies(config), rtol=1e-5, atol=0)
    assert stored["rope_freqs.weight"].max() == 8.0 and stored["rope_freqs.weight"].min() == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention_pattern": ("sliding",), "sliding_window_size": 8},
            "sliding_window_size is 8, below block_size 64",
        ),
        ({"pre_norm": False, "post_norm": True, "qk_norm": "projection"}, "this model is of family olmo2"),
        ({"qk_norm": "head", "attention_bias": True}, "attention_bias is set"),
    ],
)
def test_features_unsupported_by_llama_cpp_are_refused(fields, message, tmp_path):
    config = ModelConfig(**SIZES, **fields)
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "model.gguf", config, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_conversion_leaves_no_file(tmp_path):
    config = CONFIGS["llama"]
    with pytest.raises(ValueError, match="lacks"):
        write_gguf(tmp_path / "model.gguf", config, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="exists already"):
        write_gguf(tmp_path / "model.gguf", config, {})


TEXT = [*HARD_STRINGS, "Der schnelle braune Fuchs springt über den faulen Hund. " * 3]


def byte_bpe(folder, words=None):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder)


def sentencepiece_bpe(folder, **settings):
    import sentencepiece

    model = io.BytesIO()
    settings = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[-1:] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return open_tokenizer(folder / "tokenizer.model")


def written(tokenizer, tmp_path):
    config = ModelConfig(**{**SIZES, "vocab_size": 400})
    keys = gguf_tokenizer(tokenizer, 400)
    write_gguf(tmp_path / "model.gguf", config, build(config).state_dict(), tokenizer=keys)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    return {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.ggml.")
    }


def test_byte_level_tokenizers_keep_their_ids(tmp_path):
    tokenizer = byte_bpe(tmp_path)
    keys = written(tokenizer, tmp_path)
    assert (keys["model"], keys["pre"], len(keys["tokens"])) == ("gpt2", "gpt-2", 400)
    assert [keys["tokens"][i] for i in range(350)] == [tokenizer.id_to_token(i) for i in range(350)]
    assert keys["token_type"] == [3] + [1] * 349 + [5] * 50 and keys["eos_token_id"] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXT:
        if "</s>" not in text:  # transformers uses it as EOS
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()


def test_sentencepiece_tokenizers_keep_pieces_and_scores(tmp_path):
    tokenizer = sentencepiece_bpe(tmp_path)
    keys = written(tokenizer, tmp_path)
    assert (keys["model"], keys["add_space_prefix"], keys["unknown_token_id"]) == ("llama", False, 0)
    backend = tokenizer.backend
    assert keys["tokens"][:300] == [backend.id_to_piece(i) for i in range(300)] and len(keys["tokens"]) == 400
    assert keys["scores"][:300] == [backend.get_score(i) for i in range(300)]
    assert [kind == 6 for kind in keys["token_type"][:300]] == [backend.is_byte(i) for i in range(300)]
    assert keys["token_type"][:4] == [2, 3, 3, 6] and keys["bos_token_id"] == 1 and keys["eos_token_id"] == 2


def test_the_script_writes_a_model_with_its_tokenizer(tmp_path):
    byte_bpe(tmp_path)
    config = ModelConfig(**{**SIZES, "vocab_size": 400})
    model = build(config)
    write_folder(tmp_path / "hf", config_to_hf(config), tensors_to_hf(config, model.state_dict()))
    tokens = draw_tokens(config)

    with pytest.raises(ValueError, match="no tokenizer beside it"):
        export_to_gguf(tmp_path / "hf", tmp_path / "out/model.gguf")
    done = script(
        "convert_to_gguf.py", "--checkpoint", tmp_path / "hf", "--dtype", "float32",
        "--output", tmp_path / "out/model.gguf", "--tokenizer", tmp_path / "tokenizer.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(hf.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


def test_tokenizers_that_llama_cpp_would_apply_otherwise_are_refused(tmp_path):
    odd = byte_bpe(tmp_path, r"\p{L}+|\P{L}+")
    with pytest.raises(ValueError, match="splits words like none"):
        gguf_tokenizer(odd, 400)
    assert gguf_tokenizer(odd, 400, "llama-bpe")["tokenizer.ggml.pre"] == "llama-bpe"
    for name, near in (("llama_bpe", "did you mean llama-bpe"), ("foo", "it knows gpt-2, ")):
        with pytest.raises(ValueError, match=f"--pre_tokenizer {name} is not a pre-tokenizer of llama.cpp.*{near}"):
            gguf_tokenizer(odd, 400, name)
    assert set(PRE_TOKENIZERS) < set(LLAMA_CPP_NAMES)
    with pytest.raises(ValueError, match="350 ids, the model only 300"):
        gguf_tokenizer(odd, 300)
    with pytest.raises(ValueError, match="normalises .*nmt_nfkc.*removes spaces"):
        settings = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
        gguf_tokenizer(sentencepiece_bpe(tmp_path, **settings), 400)
