"""Files that are damaged, not regular files, or of absurd sizes; and relative data paths used from any folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from running import flags, script, train, write_dataset

from lit_data.loading.loader import Loader, RankLayout
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order, Segment
from lit_data.loading.rows import ConcatRows
from lit_data.packed.index import HEADER
from lit_data.packed.reader import PackedDataset
from lit_model.config import ModelConfig
from lit_model.load import load_tensors
from pretrain import fabric_train


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data" / "train", np.random.default_rng(7).integers(1, 90, size=60).tolist())


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the trainer refuses a command."""
    try:
        status: object = fabric_train.main(arguments)
    except SystemExit as left:
        status = left.code
    errors = capsys.readouterr().err
    assert status == 2 and "error: " in errors and "Traceback" not in errors, errors
    return errors


# --- damaged files -------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_a_flipped_bit_in_a_pointer_is_refused_by_name(packed: Path) -> None:
    """Whichever bit of an .idx flips, rows of that shard are refused and the file is named."""
    n = PackedDataset(packed).manifest.shards[0].documents
    index = packed / "data-00000.idx"
    original = index.read_bytes()
    for place in (HEADER.size + 4 * 3, HEADER.size + 4 * n + 8 * 5, HEADER.size + 4 * n + 8 * 6 + 7):
        for bit in (0, 1, 7):
            index.write_bytes(original)
            flip(index, place, bit)
            dataset = PackedDataset(packed)  # the last pointer is correct
            rows = ConcatRows(dataset, 32)
            order = Mixture.single(Order(rows.n_windows, 1))
            loader = Loader([rows], order, RankLayout(32, 8), [Segment(0, 0, 8)], prefetch_steps=2)
            with pytest.raises(ValueError, match=r"data-00000\.idx is damaged"):
                list(loader.steps(0, 40))


def test_a_manifest_that_contradicts_its_shards_is_refused_on_opening(packed: Path) -> None:
    """Counts that match each other but not the shards are detected before training."""
    manifest = json.loads((packed / "manifest.json").read_text())
    first, second, *_ = manifest["shards"]

    def opened(change: Callable[[], None]) -> str:
        saved = json.dumps(manifest)
        change()
        (packed / "manifest.json").write_text(json.dumps(manifest))
        manifest.update(json.loads(saved))
        with pytest.raises(ValueError) as error:
            PackedDataset(packed)
        return str(error.value)

    def move_token() -> None:
        manifest["shards"][0]["tokens"] += -1
        manifest["shards"][1]["tokens"] += 1

    def move_document() -> None:
        manifest["shards"][0]["documents"] += 1
        manifest["shards"][1]["documents"] -= 1

    def swap() -> None:
        manifest["shards"][0], manifest["shards"][1] = second, {**first, "name": second["name"]}

    for change in (move_token, move_document, swap):
        assert str(packed) in opened(change), change


def test_a_wrong_value_in_a_manifest_is_named_with_its_field(packed: Path) -> None:
    """The message names the shard, the wrong field, its value and the expected value."""
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shards"][1]["sizes"]["bin"] = "12"
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r'manifest\.json .*shards\[1\]\.sizes\.bin is "12"; it must be a whole number'
    ):
        PackedDataset(packed)


@pytest.mark.parametrize(
    ("field", "value"), [("skipped", None), ("segments", [{"from_step": "0"}]), ("data", {"train": 3}), ("tokens", [])]
)
def test_a_checkpoint_with_damaged_metadata_is_refused_by_name(
    exported: Path, tmp_path: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged checkpoint metadata never causes a bare TypeError or KeyError."""
    shutil.copytree(exported / "sharded", tmp_path / "run")
    given = flags(exported / "data", tmp_path / "run", data__val=None, save__state_dict_type="sharded")
    path = tmp_path / "run" / "iter-00000004-ckpt.pth" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert "iter-00000004-ckpt.pth" in refused([*given, "--resume=latest"], capsys)


# --- absurd sizes, and files that are not regular ------------------------------------------------------------------


@pytest.mark.parametrize("field", ["n_layer", "n_head", "n_embd", "intermediate_size", "block_size", "vocab_size"])
def test_a_config_of_absurd_size_is_refused(field: str, tmp_path: Path) -> None:
    """10^9 layers, or any other size like that, is refused before anything is allocated per element."""
    with pytest.raises(ValueError, match=field):
        ModelConfig(**{"rope_layers": (True, True, False), field: 10**9})
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
    names |= {"block_size": "max_position_embeddings"}
    config = {"model_type": "gemma2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config[names.get(field, field)] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"model__n_layer": 10**9},
        {"model__n_layer": 2000, "model__n_embd": 65536, "model__intermediate_size": 10**6},
        {"model__vocab_size": 10**11},
        {"train__block_size": 10**9},
        {"train__global_batch_samples": 10**12},
        {"train__micro_batch_samples": 10**6, "train__global_batch_samples": 10**6},
        {"train__max_steps": 10**18},
        {"train__max_steps": 10**40},
        {"data__prefetch_steps": 10**9},
        {"data__shuffle_block_rows": 10**30},
        {"devices": 10**6, "train__global_batch_samples": 10**6, "train__micro_batch_samples": 1},
        {"timeout_s": 10**15},
        {"guard__spike_window": 10**30},
        {"optim__warmup_steps": 10**30},
        {"data__train": None, "data__val": None, "data__synthetic__tokens": 10**18},
        {"data__train": None, "data__val": None, "data__synthetic__tokens": 9000, "model__n_layer": 10**9},
    ],
)
def test_a_run_of_absurd_size_is_refused(
    packed: Path, tmp_path: Path, setting: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """A size beyond any run is refused before any work, naming the flag, and nothing is written."""
    message = refused(flags(packed.parent, tmp_path / "run", **{"data__val": None, **setting}), capsys)
    assert any(name.split("__")[-1] in message for name in setting), message
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/run with a single-file checkpoint, DIR/sharded with a folder checkpoint, DIR/hf, DIR/data."""
    top = tmp_path_factory.mktemp("exported")
    write_dataset(top / "data" / "train", np.random.default_rng(7).integers(1, 90, size=60).tolist())
    train(*flags(top / "data", top / "run", data__val=None, train__max_steps=4))
    train(*flags(top / "data", top / "sharded", data__val=None, train__max_steps=4, save__state_dict_type="sharded"))
    assert script("convert_to_hf.py", "--checkpoint", top / "run", "--output", top / "hf").returncode == 0
    return top


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.getcwd()
        os.chdir(path.parent)  # the path of a socket may have at most 108 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(folder)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


FILES = {
    "data/train/manifest.json": ["inspect_dataset.py", "data/train"],
    "data/train/data-00000.idx": ["inspect_dataset.py", "data/train"],
    "data/train/data-00000.bin": ["inspect_dataset.py", "data/train"],
    "data/train/data-00000.docs.parquet": ["inspect_dataset.py", "data/train"],
    "run/iter-00000004-ckpt.pth": ["inspect_checkpoint.py", "run/iter-00000004-ckpt.pth"],
    "run/datapoints/order.json": ["trace_data.py", "step", "run", "1"],
    "hf/config.json": ["generate.py", "--model", "hf", "--prompt_ids", "5"],
    "hf/model.safetensors": ["generate.py", "--model", "hf", "--prompt_ids", "5"],
    "text.jsonl": ["prepare_data.py", "--input", "text.jsonl", "--tokenizer", "hf", "--output", "new"],
    "tokens.npy": [
        "import_tokens.py",
        "--input",
        "tokens.npy",
        "--output",
        "new",
        "--eos_id",
        "1",
        "--vocab_size",
        "9",
    ],
    "tokenizer.json": ["prepare_data.py", "--input", "data", "--tokenizer", "tokenizer.json", "--output", "new"],
}


@pytest.mark.parametrize(
    ("file", "make"),
    [
        *((f, m) for f in FILES for m in (make_pipe, make_device)),
        *(("text.jsonl", m) for m in (make_socket, make_folder)),
    ],
)
def test_special_files_are_refused_without_waiting(
    exported: Path, tmp_path: Path, file: str, make: Callable[[Path], None]
) -> None:
    """A named pipe, a socket, an endless device or a folder in place of a file is refused and named."""
    for part in ("data", "run", "hf"):
        shutil.copytree(exported / part, tmp_path / part)
    path = tmp_path / file
    if path.is_file():
        path.unlink()
    make(path)
    name, *arguments = FILES[file]
    places = [tmp_path / a if (tmp_path / a).exists() or a == "new" else a for a in arguments]
    answer = script(name, *places)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert str(tmp_path) in answer.stderr and not (tmp_path / "new").exists()


@pytest.mark.parametrize("make", [make_pipe, make_device, make_folder])
def test_a_config_that_is_not_a_regular_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """--config with a pipe without a writer, an endless device, or a folder."""
    make(tmp_path / "config.yaml")
    assert "config.yaml" in refused(["--config", str(tmp_path / "config.yaml")], capsys)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a: &a [*a]\n", "train: 3", "- 1", "a\0b", "\tx: 1", "x: !!python/object:os.x {}"]
)
def test_a_damaged_config_is_refused_by_name(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Deep nesting, recursive aliases, something else than a mapping, binary content, tags."""
    (tmp_path / "config.yaml").write_text(text)
    message = refused(["--config", str(tmp_path / "config.yaml")], capsys)
    assert "config.yaml" in message or "train" in message


def test_aliases_that_multiply_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """300 bytes of YAML that expand to 10^20 values."""
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert "more than" in refused(["--config", str(tmp_path / "config.yaml")], capsys)


# --- relative paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", ["now", "before"])
def test_a_run_on_a_relative_path_is_traced_from_any_folder(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    """--data.train data/train, traced from another folder; also with the relative path of an older record."""
    monkeypatch.chdir(tmp_path)
    assert fabric_train.main(flags(Path("data"), Path("runs/one"), data__val=None, train__max_steps=4)) == 0
    order = tmp_path / "runs" / "one" / "datapoints" / "order.json"
    facts = json.loads(order.read_text())
    assert Path(facts["datasets"][0]["path"]).is_absolute()
    if recorded == "before":
        facts["datasets"][0]["path"] = "data/train"
        order.write_text(json.dumps(facts))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    traced = script("trace_data.py", "verify", tmp_path / "runs" / "one")
    assert traced.returncode == 0 and "no fault" in traced.stdout, traced.stdout + traced.stderr
