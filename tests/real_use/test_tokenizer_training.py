"""Other kinds of tokenizers, and tokenizer training: output, vocabulary size, and training text."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, script

from lit_data.corpus.files import list_files
from lit_data.corpus.readers import read_documents
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_data.tokenizers.training import _beginnings, train_on_texts

LINES = [f"Zeile {i}: der Hund und die Katze laufen {i * 37} Meter über die Straße." for i in range(120)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def train(corpus: Path, output: Path, *more: object, size: object = 340):
    return script("train_tokenizer.py", "--input", corpus, "--vocab_size", size, "--output", output, *more)


def write_tiktoken(path: Path) -> None:
    path.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))


def other_kinds(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files and folders with other kinds of tokenizers: (path, their name in the message)."""
    for name in ("llama3", "gpt2", "mistral", "bert", "settings", "nanochat", "pieces"):
        (folder / name).mkdir()
    write_tiktoken(folder / "llama3" / "tokenizer.model")
    write_tiktoken(folder / "cl100k_base.tiktoken")
    (folder / "gpt2" / "vocab.json").write_text(json.dumps({chr(97 + i): i for i in range(26)}))
    (folder / "gpt2" / "merges.txt").write_text("#version: 0.2\na b\n")
    tekken = {"config": {"pattern": "."}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}
    (folder / "mistral" / "tekken.json").write_text(json.dumps(tekken))
    (folder / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    (folder / "settings" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "nanochat" / "tokenizer.pkl").write_bytes(b"\x80\x04\x95")
    return {
        "Llama 3's tokenizer.model": (folder / "llama3", "vocabulary of tiktoken"),
        "a .tiktoken file": (folder / "cl100k_base.tiktoken", "vocabulary of tiktoken"),
        "vocab.json and merges.txt": (folder / "gpt2", "holds vocab.json and merges.txt"),
        "vocab.json alone": (folder / "gpt2" / "vocab.json", "vocab.json and merges.txt"),
        "merges.txt alone": (folder / "gpt2" / "merges.txt", "vocab.json and merges.txt"),
        "a folder with tekken.json": (folder / "mistral", "tokenizer of Mistral (tekken)"),
        "tekken.json": (folder / "mistral" / "tekken.json", "tokenizer of Mistral (tekken)"),
        "WordPiece": (folder / "bert", "WordPiece"),
        "a pickle": (folder / "nanochat", "not opened here: it can run code"),
    }


def test_other_kinds_of_tokenizers_name_the_remedy(tmp_path, corpus):
    """Tiktoken, vocab.json and merges.txt, tekken.json ...: the message names the format and the remedy."""
    for path, message in other_kinds(tmp_path).values():
        done = script("prepare_data.py", "--input", corpus, "--tokenizer", path, "--output", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and "save_pretrained" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    settings = tmp_path / "settings" / "tokenizer_config.json"
    with pytest.raises(ValueError, match="holds the settings of a tokenizer, not its vocabulary: give its folder"):
        open_tokenizer(settings)


@pytest.mark.slow
def test_the_named_remedy_works(tmp_path):
    """The command in the message makes a tokenizer.json of vocab.json and merges.txt, with the same ids."""
    source = tmp_path / "gpt2"
    source.mkdir()
    trained = train_on_texts(LINES, 300, "byte_bpe", tmp_path / "trained")
    content = json.loads(trained.path.read_text())
    (source / "vocab.json").write_text(json.dumps({**content["model"]["vocab"], "<|endoftext|>": 300}))
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(ValueError) as caught:
        open_tokenizer(source)
    code = str(caught.value).split('-c "')[1].split('"')[0].replace("NEW_FOLDER", str(tmp_path / "new"))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=240, cwd=ROOT)
    opened = open_tokenizer(tmp_path / "new")
    assert opened.eos_token == "<|endoftext|>" and opened.decode(opened.encode(LINES[3])) == LINES[3]


@pytest.mark.parametrize(
    "given, proposed",
    [("x.json", "x"), ("x.model", "x"), ("new/tokenizer.json", "new"), ("new/tokenizer.model", "new")],
)
def test_an_output_that_looks_like_a_file_is_refused(tmp_path, corpus, given, proposed):
    """`--output x.json` used to create a folder of that name."""
    done = train(corpus, tmp_path / given)
    assert done.returncode == 2 and f"give {tmp_path / proposed}," in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]
    assert train(corpus, tmp_path / proposed).returncode == 0


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_small_text_gives_a_smaller_tokenizer(tmp_path, corpus, kind):
    """BabyLlama's 16,000 on a small text: a warning and the tokenizer that the text gives, not a refusal."""
    done = train(corpus, tmp_path / "tok", "--type", kind, size=16_000)
    opened = open_tokenizer(tmp_path / "tok")
    assert done.returncode == 0 and 300 < opened.vocab_size < 16_000
    assert f"warning: the text gives {opened.vocab_size} ids, fewer than --vocab_size 16000" in done.stderr
    assert opened.decode(opened.encode(LINES[7])) == LINES[7]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_more_special_tokens(tmp_path, corpus, kind):
    """The tokens of a chat format get ids, are never found in ordinary text, and transformers knows them."""
    more = ["<|im_start|>", "<|im_end|>", "a,b"]
    done = train(corpus, tmp_path / "tok", "--type", kind, "--special_tokens", *more)
    assert done.returncode == 0, done.stderr
    opened = open_tokenizer(tmp_path / "tok")
    ids = [opened.token_to_id(t) for t in more]
    fixed = 3 if kind == "byte_bpe" else 4
    assert ids == [fixed, fixed + 1, fixed + 2] and opened.vocab_size == 340 and opened.eos_token == "</s>"
    assert not set(ids) & set(opened.encode("hallo <|im_start|> a,b").tolist())
    named = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())["additional_special_tokens"]
    assert named == more
    for tokens in (["</s>"], ["<x>", "<x>"], [" "]):
        done = train(corpus, tmp_path / "bad", "--type", kind, "--special_tokens", *tokens)
        assert done.returncode == 2 and "--special_tokens" in done.stderr and not (tmp_path / "bad").exists()


def test_a_sample_is_the_beginning_of_each_file(tmp_path):
    """--max_sample_mb limits the training text: every file contributes in proportion to its size."""
    (tmp_path / "in").mkdir()
    for name, letter, megabytes in (("a", "k", 3), ("b", "q", 1)):
        words = " ".join(letter * (1 + i % 7) for i in range(1000)) + "\n"
        (tmp_path / "in" / f"{name}.txt").write_text(words * (megabytes * (1 << 20) // len(words)) + "zzzz " * 999)
    texts = list(_beginnings(list_files([tmp_path / "in"]), 1 << 20, None, {"split_documents": "line"}))
    sizes = {letter: sum(len(t) for t in texts if letter in t) for letter in "kqz"}
    assert sum(map(len, texts)) <= 1 << 20 and sizes["z"] == 0 and 2.9 < sizes["k"] / sizes["q"] < 3.1
    done = train(tmp_path / "in", tmp_path / "tok", "--max_sample_mb", 1)
    assert done.returncode == 0, done.stderr
    words = {text.strip() for _, text in open_tokenizer(tmp_path / "tok").vocabulary()}
    assert "kkk" in words and "qqq" in words and "zz" not in words
    assert train(tmp_path / "in", tmp_path / "bad", "--max_sample_mb", 0).returncode == 2


@pytest.mark.parametrize("size", [0, -1, 259, 10**11, 10**30])
def test_absurd_vocabularies_are_refused(tmp_path, corpus, size):
    """`--vocab_size 99999999999` used to abort the process."""
    for kind in ("byte_bpe", "sentencepiece"):
        done = train(corpus, tmp_path / "tok", "--type", kind, size=size)
        assert done.returncode == 2 and f"--vocab_size {size} is too" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_inputs_given_twice_and_hold_out_text(tmp_path, corpus):
    """A tokenizer is trained on each file once, and a warning is printed if it sees hold-out text."""
    once = train(corpus, tmp_path / "once")
    (tmp_path / "link.jsonl").symlink_to(corpus)
    given = ("--input", corpus, tmp_path / "link.jsonl", "--output", tmp_path / "twice", "--vocab_size", 340)
    twice = script("train_tokenizer.py", *given)
    assert once.returncode == twice.returncode == 0 and "it is read once" in twice.stderr
    assert open_tokenizer(tmp_path / "once").fingerprint == open_tokenizer(tmp_path / "twice").fingerprint
    (tmp_path / "in").mkdir()
    for name in ("a.train", "a.dev"):
        (tmp_path / "in" / name).write_text(LINES[0])
    done = train(tmp_path / "in", tmp_path / "third", size=300)
    assert done.returncode == 0 and "held-out text" in done.stderr and "a.dev" in done.stderr


def test_split_text_and_bombs(tmp_path):
    """Training has --split_documents too, and the size limit of a document."""
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    done = train(tmp_path / "a.txt", tmp_path / "tok", "--split_documents", "line")
    assert done.returncode == 0, done.stderr
    assert sum(1 for _ in read_documents([tmp_path / "a.txt"], split_documents="line")) == len(LINES)
    (tmp_path / "b.jsonl").write_bytes(b"0" * (3 << 20))
    done = train(tmp_path / "b.jsonl", tmp_path / "bad", "--max_document_mb", 2)
    assert done.returncode == 2 and "line 1: a line of more than 2 MB" in done.stderr
