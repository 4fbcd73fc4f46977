"""Cleaning profiles, rule by rule: exact text in, exact text out."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from lit_data.corpus.cleaners import BABYLM_FILES, PROFILES, open_cleaner
from lit_data.corpus.readers import Document


def document(text: str, source: str = "corpus/some.txt") -> Document:
    return Document("doc-1", text, source, 0, {})


# Per rule of a profile: input and expected output.
WIKIPEDIA = {
    "headings are unwrapped": ("== History ==\nOld.\n=== Early days ===\nOlder.", "History\nOld.\nEarly days\nOlder."),
    "references go": ("Berlin[1] is large.[12][345]", "Berlin is large."),
    "other brackets stay": ("a [sic] b [1a] c []", "a [sic] b [1a] c []"),
    "three or more newlines become two": ("a\n\n\nb\n\n\n\n\nc\n\nd\ne", "a\n\nb\n\nc\n\nd\ne"),
    "equals signs in a line stay": ("x == y\na = b\n== open\n=====", "x == y\na = b\n== open\n====="),
}
SUBTITLES = {
    "credits go": ("Subtitles by A. B.\nHello.\nsubtitles BY c", "Hello."),
    "timings go": ("00:01:02,345 --> 00:01:04,000\nHello.\n00:01:05.1 --> 00:01:06.2  X1:40", "Hello."),
    "lines of digits go": ("17\nHello.\n 18 \n19 men\n", "Hello.\n19 men"),
    "blank lines go": ("One.\n\n \t\nTwo.\n", "One.\nTwo."),
    "all of a file": ("1\n00:00:01,000 --> 00:00:02,000\n- Hi.\n- Hi!\n\n2\n", "- Hi.\n- Hi!"),
}
DIALOGUE = {
    "square brackets go": ("well [laughter] yes", "well yes"),
    "round brackets go": ("well (you know) yes", "well yes"),
    "brackets of two lines stay": ("a [b\nc] d", "a [b c] d"),
    "speaker labels go": ("A1: hello B12: hi\nC: no label, AB1: none", "hello hi C: no label, AB1: none"),
    "white space collapses": (" a \t b\n\nc\u00a0d\n", "a b c d"),
}
SIMPLE_WIKIPEDIA_PAPER = {"blank lines go": ("One.\n\n  \nTwo.\n", "One.\nTwo.")}
WIKIPEDIA_PAPER = {
    "headings are unwrapped": ("= = = Berlin = = =\nText.\n= = = = Deep = = = =", "Berlin\nText.\nDeep"),
    "other equals signs stay": ("= Berlin =\na = = = b\n= = =", "= Berlin =\na = = = b\n= = ="),
    "lines are stripped and blank ones go": ("  One. \n\n \n\tTwo.\n", "One.\nTwo."),
}
QED_PAPER = {
    "lines of upper case get sentence case": (
        "HELLO THERE. IS lT YOU? YES!\nNot this LINE, though.",
        "Hello there. Is it you? Yes!\nNot this LINE, though.",
    ),
    "half the letters are enough": ("ABcd, 12", "Abcd, 12"),
    "less than half are not": ("ABcde. f", "ABcde. f"),
    "lines without letters stay": ("12 - 13\n\n...", "12 - 13\n\n..."),
    "the first letter counts, not the first sign": ('"WHAT?" - "NO." 3.5 ÜBER', '"What?" - "no." 3.5 über'),
    "after a mark and space": ("ONE.TWO. - THREE", "One.two. - Three"),
}
SQUEEZED_PAPER = {
    "runs of blanks become one": ("a  b\t\tc\u00a0d\n\ne", "a b c d\n\ne"),
    "no space before marks": (
        "one , two . three ! four ? five ; six : seven",
        "one, two. three! four? five; six : seven",
    ),
}
CBT_PAPER = SQUEEZED_PAPER | {
    "contractions are rejoined": (
        "do n't do don 't , it 's we 'll we 're I 'm I 've he 'd he ’s",
        "do n't do don't, it's we'll we're I'm I've he'd he’s",
    ),
    "quotations are not": ("she said 'stay here' and 'so'", "she said 'stay here' and 'so'"),
}
OPEN_SUBTITLES_PAPER = {
    "lines with subtitle go": ("Subtitles by X\nOne.\nbest SUBTITLE site\nTwo.\n\n3\n", "One.\nTwo.\n\n3\n")
}
UNCHANGED = {
    name: (text, text)
    for rules in (WIKIPEDIA, SUBTITLES, DIALOGUE, QED_PAPER, CBT_PAPER, OPEN_SUBTITLES_PAPER, WIKIPEDIA_PAPER)
    for name, (text, _) in rules.items()
}

SINGLE = {"wikipedia": WIKIPEDIA, "subtitles": SUBTITLES, "dialogue": DIALOGUE}
FIRST_SET = {
    "aochildes": DIALOGUE,
    "childes": DIALOGUE,
    "simple_wiki": WIKIPEDIA,
    "bnc_spoken": DIALOGUE,
    "switchboard": DIALOGUE,
    "open_subtitles": SUBTITLES,
    "simple_wikipedia": WIKIPEDIA,
    "wikipedia": WIKIPEDIA,
    "cbt": UNCHANGED,
    "children_stories": UNCHANGED,
    "gutenberg": UNCHANGED,
    "qed": UNCHANGED,
}
SECOND_SET = {
    "simple_wikipedia": SIMPLE_WIKIPEDIA_PAPER,
    "wikipedia": WIKIPEDIA_PAPER,
    "qed": QED_PAPER,
    "bnc_spoken": SQUEEZED_PAPER,
    "aochildes": SQUEEZED_PAPER,
    "childes": SQUEEZED_PAPER,
    "simple_wiki": SIMPLE_WIKIPEDIA_PAPER,
    "cbt": CBT_PAPER,
    "open_subtitles": OPEN_SUBTITLES_PAPER,
    "children_stories": UNCHANGED,
    "gutenberg": UNCHANGED,
    "switchboard": UNCHANGED,
}


@pytest.mark.parametrize("profile, rule", [(p, r) for p, rules in SINGLE.items() for r in rules])
def test_single_profiles(profile: str, rule: str) -> None:
    text, expected = SINGLE[profile][rule]
    assert open_cleaner(profile)(document(text)) == expected


@pytest.mark.parametrize("profile, files", [("babylm", FIRST_SET), ("babylm-paper", SECOND_SET)])
def test_sets_clean_by_the_name_of_the_file(profile: str, files: dict[str, dict[str, tuple[str, str]]]) -> None:
    assert sorted(files) == sorted(BABYLM_FILES)
    cleaner = open_cleaner(profile)
    for name, rules in files.items():
        for suffix in (".train", ".dev", ".txt.gz", ""):
            for rule, (text, expected) in rules.items():
                assert cleaner(document(text, f"babylm_10M/{name}{suffix}")) == expected, (name, rule)


@pytest.mark.parametrize("profile", ["babylm", "babylm-paper"])
def test_sets_refuse_files_they_do_not_know(profile: str) -> None:
    with pytest.raises(ValueError, match=f"--cleaner {profile}.*web.txt.*aochildes.*wikipedia"):
        open_cleaner(profile)(document("text", "corpus/web.txt"))


@pytest.mark.parametrize(
    "profile, text", [("subtitles", "1\n00:00:01,000 --> 00:00:02,000\n"), ("dialogue", "[noise]")]
)
def test_documents_that_become_empty_are_dropped(profile: str, text: str) -> None:
    assert open_cleaner(profile)(document(text)) is None


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_profiles_survive_pickling(profile: str) -> None:
    cleaner = pickle.loads(pickle.dumps(open_cleaner(profile)))
    source = "wikipedia.train"
    assert cleaner(document("One.  Two", source)) == open_cleaner(profile)(document("One.  Two", source))


@pytest.mark.parametrize(
    "unit", ["[", "(", "= ", "==", " ", "A1", ". ", "A. ", "\n", "\t \n", "00:00:00,0", "don '"], ids=repr
)
@pytest.mark.timeout(240)  # linear time is about a second; quadratic would take forever
def test_cleaning_takes_linear_time(unit: str) -> None:
    text = unit * (600_000 // len(unit))
    for profile in SINGLE:
        open_cleaner(profile)(document(text))
    for name in SECOND_SET:
        open_cleaner("babylm-paper")(document(text, name))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_cleaners.py").write_text(
        "def shout(text):\n    return text.upper()\n"
        "def by_source(document, mark='!'):\n    return document.source + mark + document.text\n"
        "def drop(text):\n    return None\n"
        "def wrong(text):\n    return 3\n"
        "def failing(text):\n    return text['a']\n"
        "number = 3\n",
        encoding="utf-8",
    )
    (tmp_path / "own_broken.py").write_text("import no_such_thing_at_all\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # the current folder is searched
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for module in ("own_cleaners", "own_broken"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return "own_cleaners"


def test_a_custom_cleaner_takes_the_text_or_the_document(own_module: str) -> None:
    assert open_cleaner(f"{own_module}:shout")(document("a b")) == "A B"
    assert open_cleaner(f"{own_module}:by_source")(document("a", "s.txt")) == "s.txt!a"
    assert open_cleaner(f"{own_module}:drop")(document("a")) is None
    assert open_cleaner("textwrap:dedent")(document("  a")) == "a"
    cleaner = pickle.loads(pickle.dumps(open_cleaner(f"{own_module}:shout")))
    assert cleaner(document("a b")) == "A B"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("wiki", "--cleaner wiki: choose one of .*wikipedia.*module:function"),
        ("own_cleaners:", "name a function as module:function"),
        (":shout", "name a function as module:function"),
        ("own cleaners:shout", "name a function as module:function"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("own_cleaners.sub:f", "there is no module own_cleaners.sub"),
        ("own_broken:f", "importing own_broken failed: ModuleNotFoundError: .*no_such_thing_at_all"),
        ("own_cleaners:no_such", "own_cleaners .*has no function no_such"),
        ("own_cleaners:number", "number is a int, not a function"),
    ],
)
def test_errors_in_the_name_are_reported(own_module: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_cleaner(spec)


@pytest.mark.parametrize(
    "function, message",
    [
        ("wrong", "--cleaner own_cleaners:wrong returned a int for document doc-1 .*some.txt"),
        ("failing", "--cleaner own_cleaners:failing failed at document doc-1 .*some.txt.*: TypeError: string indices"),
    ],
)
def test_errors_in_the_function_are_reported(own_module: str, function: str, message: str) -> None:
    cleaner = open_cleaner(f"{own_module}:{function}")
    with pytest.raises(ValueError, match=message):
        cleaner(document("a"))
