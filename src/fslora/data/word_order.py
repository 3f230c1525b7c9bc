"""The default task: is this sentence as written, or were two of its neighbouring words swapped?

Any prose gives the examples, without labels made by people: the standard library's docstrings, or a site's
own documents. One sentence gives one example, kept or swapped. Nothing but the order of words tells the
classes apart: both come from sentences that *can* be swapped, and the two words are whole lower-case words
without punctuation, neither first nor last, so no capital and no stop lands in a telling place.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fslora.config import DataConfig
from fslora.data.stdlib import read_library
from fslora.data.text import is_sentence, letters, paragraphs, sentences
from fslora.data.types import Dataset, Examples
from fslora.errors import DataError
from fslora.rng import Rng

LABEL_NAMES = ("as written", "swapped")
SUFFIXES = (".txt", ".md", ".rst", ".text")
"""The files of a folder that are read."""
MIN_WORDS, MAX_WORDS = 6, 40
FEWEST_FILES = 10
"""With fewer files than this, blocks of sentences are the groups: whole files could not fill three sides."""
LARGEST_BLOCK, SMALLEST_BLOCK, BLOCKS = 20, 4, 60
"""A block has as many sentences as make this many blocks, within these bounds."""

Statistics = dict[str, int | float | str]


@dataclass(frozen=True)
class Source:
    """Raw texts, each with the name of its group, and what was met while reading them."""

    texts: tuple[tuple[str, str], ...]
    """(group, text), in a fixed order."""
    statistics: Mapping[str, int | float | str]
    group: str
    """What a group is, e.g. 'file'."""


def load_word_order(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on ``config.source``; train, validation and test share no group.

    Raises:
        DataError: The source cannot be read, or holds too little prose for three sides.
    """
    source = read_stdlib() if config.source == "stdlib" else read_path(Path(config.source).expanduser())
    statistics: Statistics = {**source.statistics}
    found = usable_sentences(source.texts, statistics)
    kind = source.group
    if kind == "file" and len({group for group, _ in found}) < FEWEST_FILES:
        found, kind = in_blocks(found), "block of neighbouring sentences"
    by_group: dict[str, list[str]] = {}
    for group, sentence in found:
        by_group.setdefault(group, []).append(sentence)
    statistics |= {"sentences used": len(found), "a group is": kind, "groups": len(by_group)}
    sizes = {group: len(members) for group, members in by_group.items()}
    shares = (config.test_share, config.validation_share)
    try:
        test, validation, train = split_groups(sizes, shares, rng.child("sides"))
    except ValueError:
        raise DataError(
            f"data.source {config.source!r} gives {len(found)} usable sentences in {len(sizes)} groups, too "
            f"few for train, validation and test: a usable sentence is prose of {MIN_WORDS} to {MAX_WORDS} "
            f"words, starts with a capital and ends with a stop. Give more text. Found: {_listed(statistics)}"
        ) from None
    sides = {"train": train, "validation": validation, "test": test}
    statistics |= {f"groups in {name}": len(groups) for name, groups in sides.items()}
    examples = {
        name: _examples({group: by_group[group] for group in groups}, rng.child(name)) for name, groups in sides.items()
    }
    return Dataset("word-order", LABEL_NAMES, examples["train"], examples["validation"], examples["test"], statistics)


def read_stdlib() -> Source:
    """Returns the docstrings of the running Python's standard library, by top-level module."""
    library = read_library()
    return Source(
        tuple((docstring.top_level, docstring.text) for docstring in library.docstrings),
        {
            "source": f"standard library of Python {platform.python_version()}",
            "files read": library.files,
            "files that could not be parsed": library.unreadable,
            "docstrings": len(library.docstrings),
        },
        "top-level module",
    )


def read_path(path: Path, asked: str = "data.source") -> Source:
    """Returns the texts of one file, or of all text files below a folder, by file.

    Bytes that are not UTF-8 are replaced, and counted. Hidden files and folders are passed over. ``asked`` is what
    errors call the path.

    Raises:
        DataError: There is nothing there to read.
    """
    if not path.exists():
        raise DataError(f"{asked} is {str(path)!r}, but there is no such file or folder; or write 'stdlib'")
    files = list(_text_files(path)) if path.is_dir() else [path]
    counts = Counter({"empty": 0, "binary": 0, "replaced": 0})
    texts: list[tuple[str, str]] = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        data = _bytes(file, asked)
        text = data.decode("utf-8-sig", errors="replace")
        if b"\0" in data:
            counts["binary"] += 1
        elif not text.strip():
            counts["empty"] += 1
        else:
            counts["replaced"] += text.count("\ufffd") - data.count("\ufffd".encode())
            texts.append((name, text))
    if not texts:
        looked_for = f"files that end in {', '.join(SUFFIXES)}" if path.is_dir() else "UTF-8 text"
        raise DataError(
            f"{asked} {str(path)!r} holds no usable text: looked for {looked_for}, found {len(files)}; "
            f"{counts['binary']} binary (or UTF-16: save as UTF-8), {counts['empty']} empty"
        )
    statistics: Statistics = {
        "source": str(path),
        "files read": len(texts),
        "empty files": counts["empty"],
        "binary files": counts["binary"],
        "bytes that are not UTF-8, replaced": counts["replaced"],
    }
    return Source(tuple(texts), statistics, "file")


def usable_sentences(texts: Sequence[tuple[str, str]], statistics: Statistics) -> list[tuple[str, str]]:
    """Returns the (group, sentence) items that can be examples, and counts the others in ``statistics``.

    Of sentences made of the same letters only the first is used, whatever the order of words, the case, the
    digits or the punctuation. So no example is a rearrangement of another one.
    """
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    usable: list[tuple[str, str]] = []
    for group, text in texts:
        for sentence in (s for paragraph in paragraphs(text) for s in sentences(paragraph)):
            counts["sentences found"] += 1
            key = "".join(sorted(letters(sentence)))
            if not MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
                counts[f"dropped: not {MIN_WORDS} to {MAX_WORDS} words"] += 1
            elif not is_sentence(sentence):
                counts["dropped: not a sentence of prose"] += 1
            elif not swappable(sentence.split()):
                counts["dropped: no two words to swap"] += 1
            elif key in seen:
                counts["dropped: near-duplicate"] += 1
            else:
                seen.add(key)
                usable.append((group, sentence))
    statistics |= counts
    return usable


def swappable(words: Sequence[str]) -> list[int]:
    """Returns the positions i whose word may change places with its right neighbour.

    Both are inner words of lower-case letters alone (a hyphen or apostrophe inside is fine), and they differ.
    """
    plain = [word.replace("-", "").replace("'", "").replace("’", "") for word in words]
    inner = [
        piece.isalpha() and piece == piece.lower() and word[0].isalpha() and word[-1].isalpha()
        for piece, word in zip(plain, words, strict=True)
    ]
    return [i for i in range(1, len(words) - 2) if inner[i] and inner[i + 1] and words[i] != words[i + 1]]


def swapped(sentence: str, rng: np.random.Generator) -> str:
    """Returns the sentence with one swappable pair, drawn evenly, swapped."""
    words = sentence.split()
    i = int(rng.choice(swappable(words)))
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def in_blocks(found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the sentences with each group cut into blocks of neighbours, 'name#0', 'name#1' and so on."""
    size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, len(found) // BLOCKS))
    place: Counter[str] = Counter()
    blocks: list[tuple[str, str]] = []
    for group, sentence in found:
        blocks.append((f"{group}#{place[group] // size}", sentence))
        place[group] += 1
    return blocks


def split_groups(sizes: Mapping[str, int], shares: Sequence[float], rng: Rng) -> list[list[str]]:
    """Returns one list of groups per share of the examples, and last the list of all other groups.

    Groups are visited in a drawn order, and each side takes those that still fit into its share; where none
    fits it takes the smallest one. At least one group is left for every side that comes after.

    Raises:
        ValueError: There are fewer groups than sides.
    """
    if len(sizes) <= len(shares):
        raise ValueError(f"{len(sizes)} groups cannot fill {len(shares) + 1} sides")
    left = [sorted(sizes)[i] for i in rng.numpy().permutation(len(sizes))]
    total = sum(sizes.values())
    sides: list[list[str]] = []
    for later, share in zip(range(len(shares), 0, -1), shares, strict=True):
        side: list[str] = []
        room = share * total
        for group in left:
            if sizes[group] <= room and len(left) - len(side) > later:
                side.append(group)
                room -= sizes[group]
        side = side or [min(left, key=sizes.__getitem__)]
        left = [group for group in left if group not in side]
        sides.append(side)
    return [*sides, left]


def _examples(by_group: Mapping[str, Sequence[str]], rng: Rng) -> Examples:
    """One side's examples, in drawn order within a group; every second one is swapped, so groups balance."""
    stream = rng.numpy()
    order = [(group, by_group[group][i]) for group in by_group for i in stream.permutation(len(by_group[group]))]
    labels = (np.arange(len(order)) + stream.integers(2)) % 2
    texts = tuple(
        swapped(sentence, stream) if label else " ".join(sentence.split())
        for (_, sentence), label in zip(order, labels, strict=True)
    )
    return Examples(texts, labels.astype(np.int64), groups=tuple(group for group, _ in order))


def _text_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _bytes(path: Path, asked: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{asked}: {path} cannot be read: {error.strerror or error}") from None


def _listed(statistics: Mapping[str, int | float | str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in statistics.items())
