"""Every YAML of configs/: it parses, the arithmetic in its comments is right, and its model has its source's size.

Also compares docs/models.md and docs/attention.md with the code they describe.
"""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch

from lit_model.config import ModelConfig
from lit_model.cost import count_parameters
from lit_model.hf.families import FAMILIES, config_from_hf
from lit_model.kernels.variant import SERVES
from lit_model.model import GPT
from lit_model.registry import MODELS
from pretrain.fabric_train import parse
from pretrain.init_from import model_config
from pretrain.parallel import check_batch

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))

# As stated in the sources, or computed from their sizes; with as many digits as are known.
PARAMETERS = {
    "llammlein_120M": "124,766,976",
    "llammlein_1B": "1,100,310,528",
    "llammlein_7B": "6,738,939,904",
    "tinyllama_1.1B": "1.1B",
    "llama-10M": "9,685,440",
    "llama-16M": "16,584,960",
    "llama-95M": "95,371,008",
    "llama-97M": "97,241,856",
    "llama-360M": "359,973,888",
    "gpt-97M": "97.5M",
    "gpt-705M": "704.9M",
    "gpt-j-97M": "97.3M",
    "llama-58M": "58,343,936",
    "babyllama-2": "345,355,200",
    "nano-llama": "33,317,888",
    "distillation": "58,343,936",
    "teacher_llama": "1.4M",
    "teacher_gpt2": "1.3M",
    "student": "1.0M",
    "quickstart": "2.4M",
    "synthetic": "0.6M",
}

# lr, rows in a step, accumulation, epochs, warm-up
BABYLLAMA = {
    "llama-10M": (3e-4, 32, 4, 2, 100),
    "llama-16M": (3e-4, 128, 1, 4, 300),
    "llama-95M": (3e-4, 128, 8, 4, 300),
    "llama-97M": (7e-4, 128, 2, 6, 300),
    "llama-360M": (3e-4, 128, 8, 4, 300),
    "gpt-97M": (7e-4, 128, 2, 6, 300),
    "gpt-705M": (2.5e-4, 128, 16, 4, 300),
    "gpt-j-97M": (7e-4, 128, 2, 6, 300),
    "llama-58M": (2.5e-4, 32, 1, 6, 200),
}

# A vocabulary for the models that use the dataset's.
VOCABULARY = {"quickstart": 4096, "synthetic": 400, "teacher_llama": 2048, "teacher_gpt2": 2048, "student": 2048}


@functools.cache
def open_config(path):
    """RunArgs and ModelConfig of a file, as a run builds them."""
    data = [] if "synthetic:" in path.read_text(encoding="utf-8") else ["--data.train", "packed"]
    args = parse(["--config", str(path), *data])
    vocab_size = MODELS[args.model.name].vocab_size if args.model.name else VOCABULARY[path.stem]
    return args, model_config(args, vocab_size)


def build(config):
    with torch.device("meta"):
        return GPT(config)


def spelled(count, like):
    """A count with as many digits as another."""
    for unit, size in (("M", 1e6), ("B", 1e9)):
        if like.endswith(unit):
            return f"{count / size:.1f}{unit}"
    return f"{count:,}"


def numbers(pattern, text):
    """The groups of every match in the comments, as numbers; 1 for a missing group."""
    comments = " ".join(line.partition("#")[2] for line in text.splitlines())
    return [[float(g.replace(",", "")) if g else 1 for g in m.groups()] for m in re.finditer(pattern, comments)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_parses_its_arithmetic_is_right_and_its_model_builds(path):
    args, config = open_config(path)
    train = args.train
    world_size = args.num_nodes * (args.devices if isinstance(args.devices, int) else 1)
    check_batch(train, world_size)

    text = path.read_text(encoding="utf-8")
    tokens = train.global_batch_samples * (train.block_size or config.block_size)
    for (said,) in numbers(r"= ([\d.,]+(?:e\d+)?) tokens per step", text):
        assert said == pytest.approx(tokens, rel=0.01)
    if train.max_steps is not None:
        for (said,) in numbers(r"= ([\d.,]+(?:e\d+)?) tokens(?! per step)\b", text):
            assert said == pytest.approx(train.max_steps * tokens, rel=0.01)
    for gpus, rows, accumulation in numbers(r"(?:(\d+) GPUs [^x]*x )?micro-batch (\d+) x accumulation (\d+)", text):
        assert rows == train.micro_batch_samples
        assert gpus * rows * accumulation == train.global_batch_samples

    count = sum(p.numel() for p in build(config).parameters())
    if path.stem in PARAMETERS:
        assert spelled(count, PARAMETERS[path.stem]) == PARAMETERS[path.stem]


def test_every_registered_model_has_a_config():
    named = [re.search(r"^  name: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE) for path in FILES]
    assert {match[1] for match in named if match} == set(MODELS)
    stems = [path.stem for path in FILES]
    assert set(PARAMETERS) | set(BABYLLAMA) <= set(stems) and len(stems) == len(set(stems))


@pytest.mark.parametrize("name", BABYLLAMA)
def test_babyllama_configs_match_their_source(name):
    args, _ = open_config(CONFIGS / "babyllama" / f"{name}.yaml")
    train, optim = args.train, args.optim
    accumulation = train.global_batch_samples / train.micro_batch_samples
    found = (optim.lr, train.global_batch_samples, accumulation, train.max_epochs, optim.warmup_steps)
    assert found == BABYLLAMA[name]
    assert (train.block_size, optim.schedule, optim.lr_min, train.clip_norm) == (128, "cosine", 0, 1)


# Llama 4's 40 heads in 8 groups do not fit the width, and with its experts the model would have 3.9e9 parameters.
NOT_DEFAULT = {
    "gemma2": {},
    "olmo2": {},
    "llama4": {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 768,
        "intermediate_size_mlp": 3072,
    },
}


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_babylm2025_models_are_transformers_defaults_except_listed_fields(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 48000, "max_position_embeddings": 128}
    model_type = {"llama4": "llama4_text"}.get(name, name)
    theirs = transformers.AutoConfig.for_model(model_type, **sizes, **NOT_DEFAULT[name])
    args, config = open_config(CONFIGS / "babylm2025" / f"{name}.yaml")
    assert config_from_hf({**theirs.to_dict(), "architectures": None}, name=config.name) == config
    train, optim = args.train, args.optim
    assert (optim.lr, optim.weight_decay, optim.warmup_steps) == (5e-4, 0.01, 500)
    assert (train.global_batch_samples, train.max_epochs, train.block_size) == (16, 3, 128)
    assert (train.activation_checkpointing, args.save.every_steps, args.save.keep_last) == ("full", 500, 3)


def rows(text, heading):
    """The rows of the table whose first header cell is `heading`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [cells[0], *cells[2:]]


def test_the_guide_lists_every_field_kernel_family_and_config():
    guide = (CONFIGS.parent / "docs" / "models.md").read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"name"}
    assert fields <= set(re.findall(r"`(\w+)", guide))
    attention = (CONFIGS.parent / "docs" / "attention.md").read_text(encoding="utf-8")
    (_, *features, _), *kernels = rows(attention, "kernel")
    documented = {
        name.strip("`"): {feature for feature, cell in zip(features, cells, strict=True) if cell}
        for name, *cells, _ in kernels
    }
    assert documented == {name: set(served) for name, served in SERVES.items()}
    families = [re.findall(r"`(\w+)`", cells[0])[-1] for cells in rows(guide, "family, `model_type`")[1:]]
    assert set(families) == {family.model_type for family in FAMILIES}
    listed = {}
    for files, counts in rows(guide, "files of `configs/`")[1:]:
        names = [Path(name).name for name in re.findall(r"`([\w./-]+)`", files)]
        counts = re.findall(r"[\d,]{9,}", counts)
        listed.update(zip(names, counts or [None] * len(names), strict=True))
    assert set(listed) == {path.stem for path in FILES}
    for path in FILES:
        assert listed[path.stem] in (None, f"{count_parameters(open_config(path)[1]):,}"), path.stem
