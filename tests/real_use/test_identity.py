"""Models and data must have the same tokenizer, and ids without a token are never sampled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from legacy_files import litgpt_fields, save_legacy, to_legacy
from running import flags, metrics, script, train

from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.compare import difference, ids_digest
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_data.tokenizers.training import train_on_texts
from lit_eval.model.model_tokenizer import check_model_and_data, ids_without_token
from lit_model.load import Checkpoint, load_tensors

os.environ["HF_HUB_OFFLINE"] = "1"

LINES = [
    "Der Hund läuft über die Straße, und die Katze schläft 24 Stunden am Tag. Ende gut, alles gut! " * 3,
    "Es war einmal ein König, der hatte 3 Töchter und 1250 Schafe; die aßen 7,5 % des Grases. " * 3,
]
ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and 12 cats watch it all day long, sitting beside the garden wall. "
    "Once upon a time there lived a king who had three daughters and a thousand sheep; nobody ever counted them twice. "
    * 3
]
SIZES = ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size")
SHORT: dict[str, object] = {"data__val": None, "train__max_steps": 1, "optim__warmup_steps": 0}
FROM_A_MODEL = {**{f"model__{size}": None for size in SIZES}, **SHORT}
OVERRIDE = "--data.allow_tokenizer_mismatch"
WAYS_IN = ("run", "checkpoint", "hf", "start.pth", "legacy.pth")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers of equal size `a` and `b`, and a sentencepiece model `sp`; data of each, and runs with `a` and `sp`.

    All starting points are derived from these two runs: Hugging Face folders, and checkpoints imported from them.
    """
    top = tmp_path_factory.mktemp("identity")
    (top / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 4))
    train_on_texts(LINES, 340, "byte_bpe", top / "tokenizers" / "a")
    train_on_texts(ENGLISH, 340, "byte_bpe", top / "tokenizers" / "b")
    train_on_texts(LINES, 340, "sentencepiece", top / "tokenizers" / "sp")
    for name in ("a", "b", "sp"):
        done = script(
            *("prepare_data.py", "--input", top / "text.jsonl", "--tokenizer", top / "tokenizers" / name),
            *("--output", top / "data" / name, "--workers", 1),
        )
        assert done.returncode == 0, done.stderr
    for name in ("a", "sp"):
        made = top / name
        train(*flags(top / "data" / name, made / "run", **SHORT))
        for line in (
            ("convert_to_hf.py", "--checkpoint", made / "run", "--output", made / "hf"),
            ("convert_from_hf.py", "--input", made / "hf", "--output", made / "start.pth"),
        ):
            assert script(*line).returncode == 0
    config, tensors = load_tensors(top / "a" / "run")
    save_legacy(top / "a" / "lit_model.pth", to_legacy(tensors, config, "litgpt"))
    (top / "a" / "model_config.yaml").write_text(yaml.safe_dump(litgpt_fields(config)))
    done = script(
        *("convert_legacy.py", top / "a" / "lit_model.pth", top / "a" / "legacy.pth"),
        *("--tokenizer", top / "tokenizers" / "a"),
    )
    assert done.returncode == 0, done.stderr
    return top


def path_of(world: Path, way: str, name: str = "a") -> Path:
    return next((world / name / "run").glob("iter-*")) if way == "checkpoint" else world / name / way


def begin(world: Path, model: Path, data: str, out: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """Train one step from a model, on this data."""
    given = {**FROM_A_MODEL, "init_from": model, **changes}
    return train(*flags(world / "data" / data, out, **given), check=False)


def unknown(world: Path, model: Path, data: str) -> str | None:
    """The messages before training starts; raises the error with which it would be refused."""
    return check_model_and_data(model, PackedDataset(world / "data" / data / "train"), f"--init_from {model}")


@pytest.mark.parametrize("way", WAYS_IN)
def test_data_of_another_tokenizer_is_refused(world: Path, way: str) -> None:
    """Every starting point knows its tokenizer: its own data is accepted silently, other data is refused."""
    model = path_of(world, way)
    assert unknown(world, model, "a") is None
    with pytest.raises(ValueError, match="another tokenizer") as error:
        unknown(world, model, "b")
    for name in "ab":
        assert open_tokenizer(world / "tokenizers" / name).fingerprint[:12] in str(error.value)
    for word in (f"--init_from {model}", str(world / "data" / "b" / "train"), f"{OVERRIDE} true"):
        assert word in str(error.value)
    if way in ("run", "checkpoint", "hf"):  # whose tokenizer is available
        assert re.search(r"id \d+ is '.*' in one, '.*' in the other", str(error.value))


def test_training_refuses_before_creating_anything(world: Path, tmp_path: Path) -> None:
    """The same number of ids, but other tokens."""
    done = begin(world, path_of(world, "hf"), "b", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stdout.startswith(f"error: --init_from {path_of(world, 'hf')} was trained with another tokenizer")
    done = begin(world, path_of(world, "hf"), "a", tmp_path / "run")
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout


def test_the_override_and_a_resume(world: Path, tmp_path: Path) -> None:
    """A difference can be allowed by name; a resume does not check again, even if the model no longer exists."""
    model = shutil.copyfile(path_of(world, "start.pth"), tmp_path / "start.pth")
    done = begin(world, model, "b", tmp_path / "run", data__allow_tokenizer_mismatch="true")
    assert done.returncode == 0, done.stdout
    again = flags(world / "data" / "b", tmp_path / "run", **{**FROM_A_MODEL, "init_from": model, "train__max_steps": 2})
    model.unlink()
    done = train(*again, "--resume=latest", "--resume_allow=train.max_steps", check=False)
    assert done.returncode == 0 and metrics(tmp_path / "run")[-1]["step"] == "2", done.stdout


@pytest.mark.parametrize("way", ["hf", "start.pth", "run"])
def test_a_sentencepiece_model_and_its_converted_file_are_the_same(world: Path, way: str) -> None:
    """The tokenizer.json exported by a run with a .model gives the same ids under another fingerprint."""
    own, exported = open_tokenizer(world / "tokenizers" / "sp"), open_tokenizer(world / "sp" / "hf")
    assert own.fingerprint != exported.fingerprint and ids_digest(own) == ids_digest(exported)
    assert unknown(world, path_of(world, way, "sp"), "sp") is None
    with pytest.raises(ValueError, match="another tokenizer"):
        unknown(world, path_of(world, way, "sp"), "a")


def remove_tokenizer(folder: Path) -> None:
    for file in {*folder.glob("*token*"), *folder.glob("chat_template*")}:
        file.unlink()


@pytest.mark.parametrize("name", ["a", "sp"])
def test_an_export_keeps_its_identity_through_transformers(world: Path, tmp_path: Path, name: str) -> None:
    """The exported tokenizer has the data's fingerprint; re-saved by transformers it is still recognised."""
    transformers = pytest.importorskip("transformers")
    folder = world / name / "hf"
    if name == "a":
        wanted = PackedDataset(world / "data" / "a" / "train").manifest.tokenizer["fingerprint"]
        assert open_tokenizer(folder).fingerprint == wanted
    copy = shutil.copytree(folder, tmp_path / "hf")
    remove_tokenizer(copy)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
    assert unknown(world, copy, name) is None
    with pytest.raises(ValueError, match="another tokenizer"):
        unknown(world, copy, "b")


def test_an_unknown_tokenizer_is_reported_in_one_line(world: Path, tmp_path: Path) -> None:
    """A model without a tokenizer, one imported by an older version, and data imported as bare ids."""
    bare = shutil.copytree(world / "a" / "hf", tmp_path / "hf")
    remove_tokenizer(bare)
    done = begin(world, bare, "b", tmp_path / "run")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and f"--init_from {bare} does not say which tokenizer it was trained with" in line
    done = script("convert_from_hf.py", "--input", bare, "--output", tmp_path / "unknown.pth")
    assert done.returncode == 0 and "its tokenizer is not known" in done.stdout
    content = torch.load(path_of(world, "start.pth"), weights_only=True)
    meta = json.loads(content["meta"])
    del meta["tokenizer"]
    torch.save({**content, "meta": json.dumps(meta)}, tmp_path / "old.pth")
    for model in (tmp_path / "unknown.pth", tmp_path / "old.pth"):
        assert f"{model} does not say which tokenizer it was trained with" in str(unknown(world, model, "b"))
    ids = shutil.copytree(world / "data" / "b" / "train", tmp_path / "ids")
    manifest = json.loads((ids / "manifest.json").read_text())
    manifest["tokenizer"] |= {"kind": "unknown", "fingerprint": "of no tokenizer"}
    (ids / "manifest.json").write_text(json.dumps(manifest))
    said = check_model_and_data(world / "a" / "run", PackedDataset(ids), "--init_from x")
    assert said is not None and f"{ids} does not say which tokenizer made it" in said


def test_an_unusable_tokenizer_counts_as_unknown(world: Path, tmp_path: Path) -> None:
    """A folder whose tokenizer has no EOS is accepted, and the message gives the reason."""
    folder = shutil.copytree(world / "a" / "hf", tmp_path / "hf")
    remove_tokenizer(folder)
    text = (world / "a" / "hf" / "tokenizer.json").read_text().replace("</s>", "[ENDE]")
    (folder / "tokenizer.json").write_text(text)
    assert "no end-of-document token" in str(unknown(world, folder, "a"))
    (folder / "tokenizer.json").write_text("{")
    assert str(folder / "tokenizer.json") in str(unknown(world, folder, "a"))


def test_a_tokenizer_that_grew(world: Path, tmp_path: Path) -> None:
    """Data of a tokenizer with one more token, for a model with enough rows: refused with the difference."""
    content = json.loads((world / "tokenizers" / "a" / "tokenizer.json").read_text())
    flags_of = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": 340, "content": "<|im_start|>", **flags_of})
    shutil.copytree(world / "tokenizers" / "a", tmp_path / "grown")
    (tmp_path / "grown" / "tokenizer.json").write_text(json.dumps(content))
    one, other = open_tokenizer(world / "tokenizers" / "a"), open_tokenizer(tmp_path / "grown")
    assert difference(one, other) == "340 ids in one, 341 in the other; the ids of both have the same tokens"
    done = script(
        *("prepare_data.py", "--input", world / "text.jsonl", "--tokenizer", tmp_path / "grown"),
        *("--output", tmp_path / "data", "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="340 ids in one, 341 in the other"):
        check_model_and_data(world / "a" / "run", PackedDataset(tmp_path / "data" / "train"), "--init_from x")


def test_differences_in_fingerprints_but_not_in_ids(world: Path, tmp_path: Path) -> None:
    """Another serialisation gives the same ids; other merges of the same tokens do not."""
    source = world / "tokenizers" / "a"
    content = json.loads((source / "tokenizer.json").read_text())
    shutil.copytree(source, tmp_path / "spelled")
    spelled = {**content, "normalizer": {"type": "Sequence", "normalizers": []}}
    (tmp_path / "spelled" / "tokenizer.json").write_text(json.dumps(spelled))
    shutil.copytree(source, tmp_path / "merged")
    merges = content["model"]["merges"]
    (tmp_path / "merged" / "tokenizer.json").write_text(
        json.dumps({**content, "model": {**content["model"], "merges": merges[::-1]}})
    )
    one, spelled_one, merged = (open_tokenizer(p) for p in (source, tmp_path / "spelled", tmp_path / "merged"))
    assert len({t.fingerprint for t in (one, spelled_one, merged)}) == 3
    assert ids_digest(one) == ids_digest(spelled_one) and difference(one, spelled_one) is None
    assert ids_digest(one) != ids_digest(merged) and "all ids have the same tokens, but" in str(difference(one, merged))


def test_teachers_and_their_caches(world: Path, tmp_path: Path) -> None:
    """Teachers in any form, and cached ones, must have the data's tokenizer."""
    cache = ("--block_size", 32, "--k", 4, "--output", tmp_path / "cache")
    arguments = ("cache_teacher.py", "--teachers", world / "sp" / "hf", *cache)
    done = script(*arguments, "--data", world / "data" / "b" / "train")
    assert done.returncode == 2 and "another tokenizer" in done.stderr
    assert "override with --allow_tokenizer_mismatch" in done.stderr and not (tmp_path / "cache").exists()
    done = script(*arguments, "--data", world / "data" / "sp" / "train")
    assert done.returncode == 0, done.stderr
    given = {**SHORT, "objective": "distillation", "distillation__teachers": f"[{{path: {world / 'a' / 'hf'}}}]"}
    done = train(*flags(world / "data" / "sp", tmp_path / "run", **given), check=False)
    assert done.returncode == 2
    assert f"--distillation.teachers {world / 'a' / 'hf'} was trained with another tokenizer" in done.stdout


def test_export_refuses_another_tokenizer(world: Path, tmp_path: Path) -> None:
    """Export refuses another tokenizer if the model's is known; generation warns."""
    other = ("--tokenizer", world / "tokenizers" / "b")
    for model in ("run", "start.pth", "legacy.pth"):
        done = script("convert_to_hf.py", "--checkpoint", world / "a" / model, "--output", tmp_path / "hf", *other)
        assert done.returncode == 2 and "is not the tokenizer that" in done.stderr and not (tmp_path / "hf").exists()
    done = script("convert_to_gguf.py", "--checkpoint", world / "a" / "hf", "--output", tmp_path / "x.gguf", *other)
    assert done.returncode == 2 and "is not the tokenizer that" in done.stderr
    done = script("generate.py", "--model", world / "a" / "run", "--prompt", "a", "--max_new_tokens", 1, *other)
    assert done.returncode == 0 and done.stderr.startswith("warning: ") and "is not the tokenizer" in done.stderr
    own = ("--tokenizer", world / "tokenizers" / "sp")
    done = script("generate.py", "--model", world / "sp" / "hf", "--prompt", "a", "--max_new_tokens", 1, *own)
    assert done.returncode == 0 and "warning" not in done.stderr


def test_an_imported_checkpoint_stores_its_tokenizer(world: Path) -> None:
    """An imported checkpoint stores the fingerprint of the tokenizer next to it."""
    for way in ("start.pth", "legacy.pth"):
        facts = Checkpoint(path_of(world, way)).meta["tokenizer"]
        assert facts["fingerprint"] == open_tokenizer(world / "tokenizers" / "a").fingerprint
        assert facts["ids_digest"] == ids_digest(open_tokenizer(world / "tokenizers" / "a"))


def test_ids_without_a_token_are_never_sampled(world: Path, tmp_path: Path) -> None:
    """A vocabulary larger than the tokenizer's, and a model whose most likely ids have no token."""
    run = tmp_path / "run"
    shutil.copytree(world / "sp" / "run", run)
    file = next(run.glob("iter-*"))
    content = torch.load(file, weights_only=True)
    meta = json.loads(content["meta"])
    meta["model_config"]["vocab_size"] = 380
    content["meta"] = json.dumps(meta)
    content["model"]["lm_head.weight"][340:380] *= 1e4
    torch.save(content, file)
    arguments = ("--max_new_tokens", 10, "--json", "--seed", 3)
    for temperature in (0, 1):
        for prompt in (("--prompt", "Der Hund"), ("--prompt_ids", "300,301")):
            done = script("generate.py", "--model", run, *prompt, *arguments, "--temperature", temperature)
            assert done.returncode == 0, done.stderr
            assert max(json.loads(done.stdout)["ids"]) < 340
    assert script("convert_to_hf.py", "--checkpoint", run, "--output", tmp_path / "hf").returncode == 0
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([[300, 301]])
    for sampled in (False, True):
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=sampled)
        assert int(ids[0, 2:].max()) < 340
    shutil.rmtree(run / "tokenizer")  # the checkpoint stores its number of ids
    done = script("generate.py", "--model", run, "--prompt_ids", "300,301", *arguments)
    assert done.returncode == 0 and max(json.loads(done.stdout)["ids"]) < 340


def test_holes_in_a_tokenizer_are_ids_without_a_token(world: Path, tmp_path: Path) -> None:
    """A vocabulary with unused ids."""
    content = json.loads((world / "tokenizers" / "a" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 345
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 346
    assert ids_without_token(world / "a" / "run", tokenizer, 348) == [339, 340, 341, 342, 343, 344, 346, 347]
    assert ids_without_token(world / "a" / "run", None, 348) == list(range(340, 348))
