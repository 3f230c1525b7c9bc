"""From raw text to the two built-in tasks: cleaning, word order, chapters."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.config import DataConfig
from fslora.data import limited, load_dataset
from fslora.data.batches import IGNORED, Encoded, by_length, padded, step_width
from fslora.data.chapters import CHAPTER_OF, CHAPTERS, MASK, masked
from fslora.data.stdlib import read_library
from fslora.data.text import is_prose, is_sentence, letters, paragraphs, sentences
from fslora.data.types import Dataset, Examples
from fslora.data.word_order import FEWEST_FILES, split_groups, swappable, swapped, usable_sentences
from fslora.errors import DataError
from fslora.rng import Rng

TEXT = """the old boat slowly left harbour while many gulls cried above grey water and nobody on land saw it
go because every child in town had gone home before dark to eat warm bread with salt butter"""
WORDS = TEXT.split()


def story(count: int, seed: int = 0) -> list[str]:
    """Returns sentences of eight to twelve different words."""
    draw = random.Random(seed)
    chosen = (draw.sample(WORDS, draw.randint(8, 12)) for _ in range(count))
    return [" ".join(words).capitalize() + "." for words in chosen]


def load(source: Path | str, seed: int = 0, **fields) -> Dataset:
    return load_dataset(DataConfig(source=str(source), **fields), Rng(seed))


def sides(data: Dataset) -> dict[str, Examples]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


@pytest.fixture(scope="module")
def word_order() -> Dataset:
    return load("stdlib", max_validation=0, max_test=0)


@pytest.fixture(scope="module")
def chapters() -> Dataset:
    return load("stdlib", task="chapters", max_validation=0, max_test=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(FEWEST_FILES + 2):
        path = tmp_path / "notes" / f"ward{number:02d}" / ("log.md" if number % 2 else "log.txt")
        path.parent.mkdir(parents=True)
        path.write_text("\n\n".join(story(12, seed=number)), encoding="utf-8")
    return tmp_path / "notes"


# Cleaning


def test_paragraphs_leave_out_code_and_markup():
    text = """
    # A heading

    First line of `prose` here
    and its **second** line, see [the page](http://example.org).

    >>> 1 + 1
    2

    * An item about :func:`open` files.
    * Another one
      that goes on.

    ```
    code = not_prose
    ```
    | a | table |
    ===========
    Last paragraph."""
    assert paragraphs(text) == [
        "First line of prose here and its second line, see the page.",
        "An item about open files.",
        "Another one that goes on.",
        "Last paragraph.",
    ]


def test_sentences_end_at_stops_but_not_at_abbreviations():
    text = 'Use a file, e.g. a log. Mr. Smith agreed! "Did he?" Yes. See version 3.2 of it.'
    assert sentences(text) == [
        "Use a file, e.g. a log.",
        "Mr. Smith agreed!",
        '"Did he?"',
        "Yes.",
        "See version 3.2 of it.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The quick brown fox jumps over it.", True),
        ("Ελληνικά γράμματα είναι επίσης γράμματα εδώ.", True),
        ("starts with a small letter and stops.", False),
        ("Ends without any stop", False),
        ("x = f(a_b, 3) and y[2] -> z_1.", False),
    ],
)
def test_is_sentence(text, expected):
    assert is_sentence(text) is expected


def test_is_prose_counts_plain_words():
    assert is_prose("four plain words, and foo_bar")
    assert not is_prose("three plain words foo_bar x=1")


# The library


def test_library_is_read_in_order_and_without_tests(tmp_path: Path):
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    (tmp_path / "pack" / "tests" / "inner.py").write_text('"""No."""')
    (tmp_path / "pack" / "__init__.py").write_text('"""Pack."""\nclass A:\n    """A."""\n    def f(self):\n        "f"')
    (tmp_path / "pack" / "part.py").write_text(
        'try:\n    pass\nexcept OSError:\n    def g():\n        """\n        G\n        """'
    )
    (tmp_path / "broken.py").write_text("def f(:")
    library = read_library(tmp_path)
    assert [(d.module, d.text) for d in library.docstrings] == [
        ("pack", "Pack."),
        ("pack", "A."),
        ("pack", "f"),
        ("pack.part", "G"),
    ]
    assert (library.files, library.unreadable) == (3, 1)


def test_library_without_sources_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"no \.py files under .*; this Python comes without"):
        read_library(tmp_path)


# Word order


def test_swappable_are_inner_lower_case_words():
    text = "See how the well-known Python reader, it's said, reads reads lines from files."
    words = text.split()
    assert [(words[i], words[i + 1]) for i in swappable(words)] == [
        ("how", "the"),
        ("the", "well-known"),
        ("reads", "lines"),
        ("lines", "from"),
    ]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "Python", "files,", "x_1", "(see"]), min_size=4, max_size=15),
    st.integers(0, 99),
)
def test_swapped_is_one_transposition_of_inner_words(words, seed):
    if not swappable(words):
        return
    result = swapped(" ".join(words), Rng(seed).numpy()).split()
    differing = [i for i, (old, new) in enumerate(zip(words, result, strict=True)) if old != new]
    i = differing[0]
    assert differing == [i, i + 1]
    assert (result[i], result[i + 1]) == (words[i + 1], words[i])
    assert 0 < i < len(words) - 2
    assert result[i].islower()
    assert result[i + 1].islower()


def test_word_order_sides_share_no_group_and_are_balanced(word_order: Dataset):
    groups = {name: set(side.groups) for name, side in sides(word_order).items()}
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["test"]
    assert not groups["validation"] & groups["test"]
    for side in sides(word_order).values():
        assert abs(np.bincount(side.labels)[0] - np.bincount(side.labels)[1]) <= 1
        excess = Counter()
        for group, label in zip(side.groups, side.labels, strict=True):
            excess[group] += 1 if label else -1
        assert max(map(abs, excess.values())) <= 1


def test_word_order_has_enough_of_everything(word_order: Dataset):
    total = sum(map(len, sides(word_order).values()))
    assert total > 8000
    assert len(set(word_order.train.groups)) >= 50
    assert len(word_order.test) == pytest.approx(0.15 * total, rel=0.02)
    assert len(word_order.validation) == pytest.approx(0.1 * total, rel=0.02)
    assert word_order.statistics["sentences used"] == total
    counts = word_order.statistics
    dropped = sum(value for name, value in counts.items() if name.startswith("dropped"))
    assert counts["sentences found"] == total + dropped


def test_no_sentence_of_word_order_is_a_rearrangement_of_another(word_order: Dataset):
    texts = [text for side in sides(word_order).values() for text in side.texts]
    assert len({"".join(sorted(letters(text))) for text in texts}) == len(texts)


def test_word_order_labels_tell_what_was_done(word_order: Dataset):
    library = read_library()
    written = {s for d in library.docstrings for p in paragraphs(d.text) for s in sentences(p)}
    for text, label in zip(word_order.test.texts[:400], word_order.test.labels[:400], strict=True):
        words = text.split()
        undone = (" ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in range(1, len(words) - 2))
        assert any(candidate in written for candidate in undone) if label else text in written, text


def test_near_duplicates_are_dropped_and_counted():
    text = (
        "The server reads 3 lines from the open file. The server reads 14 lines from the open file!\n\n"
        "The SERVER lines reads from the open file. Another sentence stands here for good."
    )
    statistics: dict = {}
    found = usable_sentences([("a", text)], statistics)
    assert [sentence.split()[0] for _, sentence in found] == ["The", "Another"]
    assert statistics["dropped: near-duplicate"] == 2


def test_folder_is_split_by_file(folder: Path):
    data = load(folder)
    groups = [set(side.groups) for side in sides(data).values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == FEWEST_FILES + 2
    assert "ward00/log.txt" in set.union(*groups)
    assert data.statistics["a group is"] == "file"


def test_one_file_is_split_by_blocks_of_neighbours(tmp_path: Path):
    path = tmp_path / "diary.txt"
    path.write_text("\n\n".join(" ".join(story(5, seed=n)) for n in range(40)), encoding="utf-8")
    data = load(path)
    groups = [set(side.groups) for side in sides(data).values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) > 10
    assert all(group.startswith("diary.txt#") for group in set.union(*groups))


def test_word_order_is_the_same_for_the_same_seed_only(folder: Path):
    first, again, other = load(folder, seed=1), load(folder, seed=1), load(folder, seed=2)
    assert first.train.texts == again.train.texts
    assert first.test.groups == again.test.groups
    assert (first.train.labels == again.train.labels).all()
    assert first.train.texts != other.train.texts


def test_odd_files_of_a_folder_are_counted(folder: Path):
    (folder / "bad.txt").write_bytes(" ".join(story(12, seed=77)).encode() + b" The caf\xe9 na\xefve.")
    (folder / "empty.rst").write_text(" \n")
    (folder / "utf16.text").write_text("Wide characters.", encoding="utf-16")
    (folder / "picture.png").write_bytes(b"\x00\x01")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.txt").write_text("Nobody should read this sentence at all.")
    found = load(folder).statistics
    assert found["files read"] == FEWEST_FILES + 3
    assert found["bytes that are not UTF-8, replaced"] == 2
    assert found["empty files"] == 1
    assert found["binary files"] == 1


def test_missing_source_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere', but there is no such file or folder; or write 'stdlib'"):
        load(tmp_path / "nowhere")


def test_folder_without_text_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"no usable text: looked for files that end in \.txt, .*found 1; 0 .* 1 empty"):
        load(tmp_path)


def test_binary_file_is_an_error(tmp_path: Path):
    path = tmp_path / "a.docx"
    path.write_bytes(b"PK\x00\x00")
    with pytest.raises(DataError, match="no usable text: looked for UTF-8 text, found 1; 1 binary"):
        load(path)


def test_too_little_prose_is_an_error(tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text(" ".join(story(6)) + " too short.")
    with pytest.raises(DataError, match="6 usable sentences in 2 groups, too few for train, validation and test"):
        load(path)


@settings(deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 50), min_size=3, max_size=30),
    st.integers(0, 99),
)
def test_split_groups_uses_every_group_once(sizes, seed):
    parts = split_groups(sizes, (0.15, 0.1), Rng(seed))
    assert sorted(group for part in parts for group in part) == sorted(sizes)
    assert all(parts)


# Chapters


def test_chapters_are_twelve_classes_with_enough_text(chapters: Dataset):
    assert chapters.label_names == tuple(CHAPTERS)
    assert len(CHAPTERS) == 12
    for side in sides(chapters).values():
        assert np.bincount(side.labels, minlength=12).min() >= 0.025 * len(side)
    assert len(chapters.train) > 6000


def test_chapters_are_stratified_and_deduplicated(chapters: Dataset):
    everything = np.concatenate([side.labels for side in sides(chapters).values()])
    for share, side in ((0.1, chapters.validation), (0.15, chapters.test)):
        wanted = share * np.bincount(everything)
        assert np.abs(np.bincount(side.labels) - wanted).max() <= 2
    texts = [text for side in sides(chapters).values() for text in side.texts]
    assert len({letters(text) for text in texts}) == len(texts)


def test_chapters_follow_the_module_and_hide_its_name(chapters: Dataset):
    for side in sides(chapters).values():
        for text, label, group in zip(side.texts, side.labels, side.groups, strict=True):
            assert CHAPTER_OF[group] == label
            assert group.strip("_").lower() not in text.lower().replace("_", " ").split()


def test_no_module_stands_in_two_chapters():
    assert sum(len(modules.split()) for modules in CHAPTERS.values()) == len(CHAPTER_OF)


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [
        ("The JSON module reads json.", "json.decoder", f"The {MASK} module reads {MASK}."),
        ("Use xml.dom.minidom, a DOM.", "xml.dom.minidom", f"Use {MASK}, a {MASK}."),
        ("Decimal is in _pydecimal, not decimals.", "_pydecimal", f"{MASK} is in {MASK}, not decimals."),
        ("A re-used pattern, more, re.", "re", f"A {MASK}-used pattern, more, {MASK}."),
    ],
)
def test_masked(text, module, expected):
    assert masked(text, module) == expected


# Limits


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 9))
def test_limited_is_a_subset_in_order(count, limit, seed):
    examples = Examples(tuple(map(str, range(count))), np.arange(count))
    kept = limited(examples, limit, Rng(seed))
    assert len(kept) == (min(count, limit) if limit else count)
    assert (np.diff(kept.labels) > 0).all()
    assert kept.texts == limited(examples, limit, Rng(seed)).texts == tuple(map(str, kept.labels.tolist()))


def test_limits_apply_to_each_side_and_are_told(folder: Path):
    data = load(folder, max_train=20, max_validation=3, max_test=4)
    assert [len(side) for side in sides(data).values()] == [20, 3, 4]
    assert data.statistics["train examples"] == 20
    assert data.statistics["train examples left out by data.max_train"] > 0


def test_columns_of_examples_have_one_length():
    with pytest.raises(ValueError, match="2 texts but 1 labels"):
        Examples(("a", "b"), np.zeros(1, dtype=np.int64))


@given(st.integers(1, 4096), st.integers(1, 5000))
def test_a_step_is_padded_to_one_of_few_widths_that_the_model_has_room_for(longest: int, positions: int) -> None:
    width = step_width([longest, 0], positions)
    assert longest <= width <= max(longest, positions - 2)
    assert width - longest < max(1, longest / 16)
    assert step_width([longest, longest], positions) == longest


def test_widths_between_two_powers_of_two_are_sixteen() -> None:
    assert len({step_width([longest, 1], 10_000) for longest in range(65, 129)}) == 16


@given(lengths=st.lists(st.integers(1, 600), max_size=300), tokens=st.integers(1, 4096))
def test_an_evaluation_reads_every_text_once_in_few_widths_none_beyond_the_longest(
    lengths: list[int], tokens: int
) -> None:
    batches = list(by_length(np.array(lengths, dtype=np.int64), tokens))
    assert sorted(i for index, _ in batches for i in index) == list(range(len(lengths)))
    for index, width in batches:
        longest = max(lengths[i] for i in index)
        assert longest <= width <= max(lengths)
        assert width <= longest * 17 / 16 or longest < 16
        assert len(index) == 1 or len(index) * width <= tokens
    assert len({width for _, width in batches if width >= 256}) <= 16 + 5


@given(width=st.integers(5, 12))
def test_padding_widens_texts_and_leaves_their_labels(width: int) -> None:
    fields = {"input_ids": [[1, 2], [3, 4, 5, 6, 7]], "token_labels": [[2, IGNORED], [4, 5, 6, 7, 8]]}
    batch = padded(Encoded(fields, np.array([1, 0]), 0, pad_id=9).batch([1, 0]), width, 9)
    more = width - 5
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7] + [9] * more, [1, 2, 9, 9, 9] + [9] * more]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * more, [1, 1] + [0] * (3 + more)]
    assert batch["token_labels"].tolist() == [[4, 5, 6, 7, 8] + [IGNORED] * more, [2] + [IGNORED] * (4 + more)]
    assert batch["labels"].tolist() == [0, 1]
