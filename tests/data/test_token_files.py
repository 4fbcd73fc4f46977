"""Token files of other programs, compared with readers and writers of their formats that use only struct."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from document_facts import facts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_data.packed import token_files, token_import
from lit_data.packed.index import MAX_DOCUMENT_TOKENS
from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import faults_of
from lit_data.packed.token_files import MegatronIndex, find_token_files
from lit_data.packed.token_import import ImportReport, ImportSettings
from lit_data.packed.writer import PackedWriter
from lit_data.tokenizers.tokenizer import open_tokenizer

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}  # struct's letter -> Megatron's code
EOS = 0
IDS = {"vocab_size": 100, "eos_id": EOS}


def import_tokens(inputs: Sequence[Path], output: Path, **more: Any) -> ImportReport:
    return token_import.import_tokens(ImportSettings(tuple(map(str, inputs)), output, **more))


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], letter: str = "H", gap: int = 0, reverse: bool = False
) -> Path:
    """Write documents of sequences of ids. `gap` bytes separate sequences; `reverse` stores them in reverse order."""
    sequences = [s for d in documents for s in d]
    data, pointers = b"", [0] * len(sequences)
    for number in reversed(range(len(sequences))) if reverse else range(len(sequences)):
        pointers[number] = len(data)
        data += struct.pack(f"<{len(sequences[number])}{letter}", *sequences[number]) + bytes(gap)
    ends = [0, *itertools.accumulate(map(len, documents))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[letter], len(sequences), len(ends))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(ends)}q", *ends)
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


def write_chunk(path: Path, ids: Sequence[int], letter: str = "H", code: int = 8) -> Path:
    path.write_bytes(b"LITPKDS" + struct.pack("<QBQ", 1, code, len(ids)) + struct.pack(f"<{len(ids)}{letter}", *ids))
    return path


def documents_of(folder: Path) -> list[list[int]]:
    dataset = PackedDataset(folder)
    assert faults_of(dataset.path) == []
    starts = dataset.document_start(np.arange(dataset.n_documents + 1)).tolist()
    return [dataset.tokens(a, b).tolist() for a, b in itertools.pairwise(starts)]


def closed(ids: Sequence[int]) -> list[int]:
    return [*ids] if ids and ids[-1] == EOS else [*ids, EOS]


SEQUENCES = st.lists(st.integers(0, 99), max_size=6)
DOCUMENTS = st.lists(st.lists(SEQUENCES, max_size=3), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=DOCUMENTS,
    letter=st.sampled_from("BHiq"),
    gap=st.sampled_from([0, 0, 8]),
    reverse=st.booleans(),
    block=st.sampled_from([3, 1 << 22]),
    vocab_size=st.sampled_from([100, 70_000]),
)
def test_a_megatron_document_has_all_its_sequences(
    tmp_path_factory, documents, letter, gap, reverse, block, vocab_size
):
    folder = tmp_path_factory.mktemp("megatron")
    write_megatron(folder / "x", documents, letter, gap, reverse)
    filled = [ids for d in documents if (ids := [t for s in d for t in s])]
    expected = [closed(ids) for ids in filled]
    call = {"vocab_size": vocab_size, "eos_id": EOS, "append_eos": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "BLOCK_TOKENS", block)
        patch.setattr(token_files, "BLOCK_DOCUMENTS", block)
        if not expected:
            with pytest.raises(ValueError, match="no documents"):
                import_tokens([folder / "x"], folder / "out", **call)
            return
        report = import_tokens([folder / "x"], folder / "out", **call)
    assert documents_of(folder / "out") == expected
    assert report.empty_documents == len(documents) - len(expected) and report.documents == len(expected)
    assert report.appended_eos == sum(ids[-1] != EOS for ids in filled)


def test_a_compatible_bin_is_linked_and_equals_a_conversion(tmp_path):
    documents = [[[1, 2, 3], [4, EOS]], [[5, EOS]], [[]], [[6], [7], [EOS]]]
    prefix = write_megatron(tmp_path / "x", documents)
    linked = import_tokens([prefix], tmp_path / "linked", **IDS)
    copied = import_tokens([prefix], tmp_path / "copied", copy=True, **IDS)
    assert (linked.linked, copied.linked, linked.empty_documents, linked.appended_eos) == (1, 0, 1, 0)
    assert "links to the source's files" in linked.summary()
    bins = [tmp_path / name for name in ("x.bin", "linked/data-00000.bin", "copied/data-00000.bin")]
    assert bins[0].samefile(bins[1]) and not bins[0].samefile(bins[2])
    write_megatron(tmp_path / "gaps", documents, gap=2)  # cannot be linked
    converted = import_tokens([tmp_path / "gaps"], tmp_path / "converted", **IDS)
    assert converted.linked == 0
    prints = {PackedDataset(tmp_path / n).fingerprint for n in ("linked", "copied", "converted")}
    assert len(prints) == 1
    assert documents_of(tmp_path / "linked") == [[1, 2, 3, 4, EOS], [5, EOS], [6, 7, EOS]]
    facts = facts_of(PackedDataset(tmp_path / "linked"), 2)
    assert facts["id"] == "x.bin:4" and facts["place"] == 4 and facts["source"] == str(tmp_path / "x.bin")


def test_our_files_are_readable_as_megatrons(tmp_path):
    made = [[i % 90 + 1] * (i % 7) + [EOS] for i in range(500)]
    with PackedWriter(tmp_path / "a", tokenizer={"fingerprint": "f"}, shard_tokens=300, **IDS) as writer:
        for i, ids in enumerate(made):
            writer.add(ids, id=str(i))
    report = import_tokens([tmp_path / "a"], tmp_path / "b", **IDS)
    assert documents_of(tmp_path / "b") == made and report.linked == report.shards > 3
    assert [s.sha256["idx"] for s in PackedDataset(tmp_path / "b").manifest.shards] == [
        s.sha256["idx"] for s in PackedDataset(tmp_path / "a").manifest.shards
    ]


def naive_split(ids: Sequence[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for id in ids:
        if id == separator:
            parts.append([])
        else:
            parts[-1].append(id)
    return [closed(p) for p in parts if p]


STREAMS = st.lists(st.lists(st.integers(0, 4), max_size=15), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=STREAMS,
    separator=st.sampled_from([EOS, 3]),
    across=st.booleans(),
    block=st.sampled_from([2, 3, 1 << 22]),
    kind=st.sampled_from(["chunk", "npy", "flat"]),
)
def test_files_are_split_at_an_id(tmp_path_factory, streams, separator, across, block, kind):
    folder = tmp_path_factory.mktemp("split")
    for number, ids in enumerate(streams):
        if kind == "chunk":
            write_chunk(folder / f"x_{number:010d}.bin", ids)
        elif kind == "npy":
            np.save(folder / f"x_{number}.npy", np.asarray(ids, dtype=np.int64))
        else:
            (folder / f"x_{number}.bin").write_bytes(struct.pack(f"<{len(ids)}I", *ids))
    joined = [[t for ids in streams for t in ids]] if across else streams
    expected = [d for ids in joined for d in naive_split(ids, separator)]
    cutting = dict(split_at=separator, across_files=across, append_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "BLOCK_TOKENS", block)
        patch.setattr(token_files, "BLOCK_DOCUMENTS", block)
        if not expected:
            with pytest.raises(ValueError, match="no documents"):
                import_tokens([folder], folder / "out", dtype="uint32", **cutting, **IDS)
            return
        import_tokens([folder], folder / "out", dtype="uint32", **cutting, **IDS)
    assert documents_of(folder / "out") == expected


def test_places_in_split_files(tmp_path):
    write_chunk(tmp_path / "a.bin", [1, 0, 2, 2])
    write_chunk(tmp_path / "b.bin", [2, 0, 0, 3, 0])
    cutting = dict(split_at=EOS, across_files=True)
    report = import_tokens([tmp_path], tmp_path / "out", **cutting, **IDS)
    dataset = PackedDataset(tmp_path / "out")
    assert [facts_of(dataset, i)["id"] for i in range(3)] == ["a.bin:1", "a.bin:2", "b.bin:2"]
    assert (report.appended_eos, report.empty_documents) == (0, 1)


def test_a_chunk_is_one_document_or_several_of_equal_length(tmp_path):
    path = write_chunk(tmp_path / "x.bin", range(1, 8))
    import_tokens([path], tmp_path / "whole", append_eos=True, **IDS)
    assert documents_of(tmp_path / "whole") == [[1, 2, 3, 4, 5, 6, 7, EOS]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "BLOCK_TOKENS", 4)
        import_tokens([path], tmp_path / "cut", document_tokens=3, append_eos=True, **IDS)
    assert documents_of(tmp_path / "cut") == [[1, 2, 3, EOS], [4, 5, 6, EOS], [7, EOS]]
    assert facts_of(PackedDataset(tmp_path / "cut"), 2)["id"] == "x.bin:3"


@pytest.mark.parametrize(("letter", "code"), [("B", 1), ("b", 2), ("h", 3), ("i", 4), ("q", 5), ("H", 8)])
def test_types_of_chunks(tmp_path, letter, code):
    path = write_chunk(tmp_path / "x.bin", [99, 5, EOS], letter, code)
    import_tokens([path], tmp_path / "out", **IDS)
    assert documents_of(tmp_path / "out") == [[99, 5, EOS]]


def test_eos_beyond_the_sources_type(tmp_path):
    np.save(tmp_path / "x.npy", np.asarray([1, 2, 255], dtype=np.uint8))
    import_tokens([tmp_path / "x.npy"], tmp_path / "out", vocab_size=70_000, eos_id=69_999, append_eos=True)
    assert documents_of(tmp_path / "out") == [[1, 2, 255, 69_999]]


def test_a_document_without_eos_is_named(tmp_path):
    prefix = write_megatron(tmp_path / "x", [[[1, EOS]], [[2]]])
    with pytest.raises(ValueError, match=r"x\.bin: document 2 does not end with the id 0 of EOS; give --append_eos"):
        import_tokens([prefix], tmp_path / "out", **IDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("documents", [[[[1, EOS]], [[3, 100, EOS]]], [[[1, EOS]], [[3, 100]]]])
def test_an_id_beyond_the_vocabulary_is_named(tmp_path, documents):
    prefix = write_megatron(tmp_path / "x", documents)
    with pytest.raises(ValueError, match=r"x\.bin.* holds token id 100, outside the vocabulary of 100"):
        import_tokens([prefix], tmp_path / "out", append_eos=True, **IDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    write_megatron(tmp_path / "x", [[[-2, EOS]]], "i")
    with pytest.raises(ValueError, match=r"holds token id -2, outside"):
        import_tokens([prefix], tmp_path / "out", vocab_size=70_000, eos_id=0)


def cut_end(path: Path, n: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-n])


def test_truncated_files_are_refused(tmp_path):
    write_megatron(tmp_path / "m", [[[1, 2, EOS]]])
    cut_end(tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"m\.bin has 5 bytes, its \.idx names 6: it is truncated"):
        find_token_files([tmp_path / "m"])
    cut_end(tmp_path / "m.idx")
    with pytest.raises(ValueError, match=r"m\.idx has .* truncated"):
        find_token_files([tmp_path / "m"])
    (tmp_path / "m.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(ValueError, match=r"m\.idx is not a Megatron index .*or is truncated"):
        find_token_files([tmp_path / "m"])
    (tmp_path / "m.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.bin is missing"):
        find_token_files([tmp_path / "m"])
    for n in (1, 3 * 2 + 1):
        cut_end(write_chunk(tmp_path / "c.bin", [1, 2, EOS]), n)
        with pytest.raises(ValueError, match=r"c\.bin .*truncated"):
            find_token_files([tmp_path / "c.bin"])
    np.save(tmp_path / "n.npy", np.arange(9))
    cut_end(tmp_path / "n.npy")
    with pytest.raises(ValueError, match=r"n\.npy has .* truncated"):
        find_token_files([tmp_path / "n.npy"])
    (tmp_path / "f.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"f\.bin has 3 bytes, not a multiple of the 2 of --dtype uint16"):
        find_token_files([tmp_path / "f.bin"], "uint16")


def test_a_damaged_index_is_named(tmp_path):
    write_megatron(tmp_path / "m", [[[1, EOS]], [[2, EOS]]])
    good = (tmp_path / "m.idx").read_bytes()
    sections = {"length": 34, "pointer": 34 + 8, "document": 34 + 8 + 16}
    for name, place, value in [
        ("length", sections["length"], struct.pack("<i", -1)),
        ("pointer", sections["pointer"], struct.pack("<q", 1)),
        ("document", sections["document"] + 8, struct.pack("<q", 7)),
        ("cover", sections["document"] + 16, struct.pack("<q", 1)),
    ]:
        (tmp_path / "m.idx").write_bytes(good[:place] + value + good[place + len(value) :])
        with pytest.raises(ValueError, match=r"m\.idx is damaged"):
            import_tokens([tmp_path / "m"], tmp_path / "out", **IDS)
        assert not (tmp_path / "out").exists(), name
    (tmp_path / "m.idx").write_bytes(good + b"\1\1")
    with pytest.raises(ValueError, match="multimodal"):
        MegatronIndex(tmp_path / "m.idx")


def test_unsupported_inputs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_token_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"holds no \.idx, \.bin, \.ds or \.npy"):
        find_token_files([tmp_path])
    (tmp_path / "f.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"f\.bin is a flat file of tokens .* --dtype"):
        find_token_files([tmp_path])
    for array in (np.ones(3), np.ones((2, 2), int), np.ones(3, np.uint64), np.asarray([{}], object)):
        np.save(tmp_path / "n.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match=r"n\.npy"):
            find_token_files([tmp_path / "n.npy"])
    with pytest.raises(ValueError, match=r"type code 6"):
        find_token_files([write_chunk(tmp_path / "c.bin", [1], "f", 6)])
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"x\.txt is of an unknown type"):
        find_token_files([tmp_path / "x.txt"])


def test_arguments_are_checked(tmp_path):
    prefix = write_megatron(tmp_path / "x", [[[1, EOS]]])

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            import_tokens([prefix], tmp_path / "out", **{**IDS, **changes})

    refused("give --tokenizer, or --vocab_size and --eos_id", eos_id=None)
    refused("--eos_id 100 is outside", eos_id=100)
    refused("leave out --vocab_size", tokenizer="x")
    refused("--split_at: .*x.bin has an index", split_at=0)
    refused("--document_tokens: .*x.bin has an index", document_tokens=4)
    refused("--shard_tokens 0", shard_tokens=0)
    (tmp_path / "out").mkdir()
    refused("--output .*out exists already")
    for bad in ({"split_at": 0, "document_tokens": 1}, {"document_tokens": 0}, {"across_files": True}):
        with pytest.raises(ValueError, match="--"):
            import_tokens([prefix], tmp_path / "new", **bad)


def test_a_huge_document_is_refused_before_it_is_copied(tmp_path):
    """A sparse file of 2^31 tokens without an EOS is refused immediately."""
    path = tmp_path / "x.bin"
    with open(path, "wb") as f:
        f.truncate(2 * MAX_DOCUMENT_TOKENS)
    with pytest.raises(ValueError, match=r"x\.bin: document 1 would have 2147483647 tokens.*--split_at"):
        import_tokens([path], tmp_path / "out", dtype="uint16", append_eos=True, **IDS)


def test_the_tokenizer_is_copied(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<ende>": 0, "a": 1, "b": 2}, unk_token="a"))
    model.save(str(tmp_path / "mine.json"))
    write_chunk(tmp_path / "x.bin", [1, 2, 0])
    import_tokens([tmp_path / "x.bin"], tmp_path / "out", tokenizer=tmp_path / "mine.json", eos_token="<ende>")
    dataset = PackedDataset(tmp_path / "out")
    assert dataset.tokenizer_folder == tmp_path / "out" / "tokenizer"
    copied = open_tokenizer(dataset.tokenizer_folder)
    assert copied.fingerprint == dataset.manifest.tokenizer["fingerprint"] and copied.eos_id == dataset.eos_id == 0
    with pytest.raises(ValueError, match="holds token id 3"):
        import_tokens(
            [write_chunk(tmp_path / "y.bin", [3, 0])], tmp_path / "o", tokenizer=tmp_path / "out" / "tokenizer"
        )


def test_megatron_core_writes_what_we_read(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    documents = [[[1, 2], [3, EOS]], [[4, EOS]], [[5], [6], [7, EOS]]]
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    import_tokens([tmp_path / "x"], tmp_path / "out", **IDS)
    made = [[t for s in d for t in s] for d in documents]
    assert documents_of(tmp_path / "out") == made
    theirs = indexed.IndexedDataset(str(tmp_path / "out" / "data-00000"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == made
