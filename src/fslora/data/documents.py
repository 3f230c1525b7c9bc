"""The task of writing text: documents, cut into examples of which every token is predicted.

A document is a source file of the standard library, a text file, or a row of a table. Its pieces, joined, are the
document again, up to pieces of nothing but white space, which are counted and left out.

Perplexity is asked of each client's own kind of text, so every group is in train, and gives test and validation their
shares. These are runs of neighbouring pieces at drawn places, not scattered ones: a scattered piece would stand
between two that are trained on, while of a run only the ends do. Groups of very few pieces are held out as they come.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fslora.config import TABLE_SUFFIXES, DataConfig
from fslora.data.causal import Part, assemble, dropped_for, group_column, listed, stratum_column, text_columns, usable
from fslora.data.readers import JSON_SUFFIX
from fslora.data.sources import read_rows, where
from fslora.data.stdlib import read_sources
from fslora.data.types import Dataset, Examples, Index
from fslora.data.word_order import in_blocks
from fslora.errors import DataError
from fslora.rng import Rng

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".py")
"""With these a source is a text file, whether it exists or not."""
TABLES = (*TABLE_SUFFIXES, JSON_SUFFIX)
IN_FILES = "file, or folder of files"
"""What a group is where the source is text files."""
SPAN = 100
"""Each so many neighbouring pieces of a group give a run to every held-out side."""
SMALLEST = 4
"""Groups of fewer pieces cannot be cut in three: they are lined up and cut together."""


class Document(NamedTuple):
    """A text, and whose it is."""

    group: str | None
    text: str
    stratum: str | None = None


class TextFiles(NamedTuple):
    """The text files of a source."""

    root: Path
    texts: list[Path]
    tables: int
    """How many files beside them are tables."""


@dataclass
class Documents:
    """What was read of one side."""

    entries: list[Document]
    unit: str
    """What a group is; '' without groups."""
    counts: Counter[str] = field(default_factory=Counter)
    """What was met and dropped on the way."""


def load_text(config: DataConfig, rng: Rng) -> Dataset:
    """Returns pieces of documents as ``target``, after empty prompts.

    Groups are the top-level modules of the standard library; the files and folders directly below a folder, or blocks
    of neighbouring pieces of a single file; the rows of a table that are alike in data.group, or of one file of many.

    Raises:
        DataError: The source cannot be read, or holds too little text for three sides.
    """
    read = {"train": _read(config, "train")}
    read |= {side: _read(config, side) for side in ("test", "validation") if getattr(config, side) is not None}
    parts = {side: _pieces(documents, config.characters) for side, documents in read.items()}
    shares = {"test": config.test_share, "validation": config.validation_share}
    shares = {side: share for side, share in shares.items() if side not in parts}
    whole = parts["train"]
    *held, rest = runs(_strands(whole), list(shares.values()), rng.child("sides"))
    sides = parts | {side: whole.take(index) for side, index in zip(shares, held, strict=True)}
    sides["train"] = whole.take(rest)
    counts: Counter[str] = Counter()
    for documents in read.values():
        counts += documents.counts
    remedy = (
        f"data.source {config.source!r} is cut into {len(whole.examples)} examples: give more text, lower "
        "data.characters, or give data.validation and data.test their own"
    )
    for side, part in sides.items():
        usable(side, part, counts, remedy)
    source = f"standard library of Python {platform.python_version()}" if config.source == STDLIB else config.source
    statistics: dict[str, int | float | str] = {
        "source": source,
        **counts,
        "a group is": read["train"].unit or "not known",
    }
    return assemble("text", sides, statistics)


def cut(text: str, size: int) -> list[str]:
    """Returns the text in pieces of at most ``size`` characters, as few as lines allow; joined they are the text.

    Pieces end at line ends. A line that is longer is cut behind spaces, and a word that is longer anywhere.
    """
    pieces: list[str] = []
    open_piece = ""
    for line in text.splitlines(keepends=True):
        if len(open_piece) + len(line) > size:
            pieces.append(open_piece)
            open_piece = line
            while len(open_piece) > size:
                end = open_piece.rfind(" ", 0, size) + 1 or size
                pieces.append(open_piece[:end])
                open_piece = open_piece[end:]
        else:
            open_piece += line
    return [piece for piece in (*pieces, open_piece) if piece]


def runs(strands: Sequence[str], shares: Sequence[float], rng: Rng) -> list[Index]:
    """Returns one sorted index list per share, and last the list of the rest.

    Each strand (the examples of one name, in their order) is cut into spans of at most ``SPAN`` neighbours. In each
    span the shares are runs next to each other at a drawn place. Their lengths are rounded up or down by lot, so that
    many small strands give as much as a large one; one example of each span at least is left for the rest.
    """
    members: dict[str, list[int]] = {}
    for position, strand in enumerate(strands):
        members.setdefault(strand, []).append(position)
    stream = rng.numpy()
    taken: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for positions in members.values():
        for span in np.array_split(positions, -(-len(positions) // SPAN)):
            lengths: list[int] = []
            for share in shares:
                wanted = int(share * len(span) + stream.random())
                lengths.append(min(wanted, len(span) - 1 - sum(lengths)))
            start = int(stream.integers(len(span) - sum(lengths) + 1))
            ends = start + np.cumsum([0, *lengths])
            for side, (low, high) in enumerate(pairwise(ends)):
                taken[side].extend(span[low:high])
            taken[-1].extend([*span[:start], *span[ends[-1] :]])
    return [np.sort(np.array(side, dtype=np.int64)) for side in taken]


def _strands(part: Part) -> list[str]:
    """What is cut as one line of text: the same group and stratum, or all that is too small for that together."""
    nothing = [""] * len(part.examples)
    pairs = zip(part.strata or nothing, part.examples.groups or nothing, strict=True)
    names = [f"{stratum}\0{group}" for stratum, group in pairs]
    sizes = Counter(names)
    return [name if sizes[name] >= SMALLEST else "" for name in names]


def _pieces(documents: Documents, size: int) -> Part:
    """The documents' pieces, in their order."""
    found = [(document, piece) for document in documents.entries for piece in cut(document.text, size) if piece.strip()]
    total = sum(len(document.text) for document in documents.entries)
    documents.counts["documents"] += len(documents.entries)
    documents.counts["characters"] += total
    documents.counts["characters in pieces of white space, left out"] += total - sum(len(piece) for _, piece in found)
    groups = tuple(document.group or "" for document, _ in found)
    if documents.unit == IN_FILES and len(set(groups)) == 1:  # one group is no federation
        groups = tuple(block for block, _ in in_blocks([(group, "") for group in groups]))
        documents.unit = "block of neighbouring pieces"
    examples = Examples(
        texts=("",) * len(found),
        labels=np.zeros(len(found), dtype=np.int64),
        groups=groups if documents.unit else None,
        columns={"target": tuple(piece for _, piece in found)},
    )
    strata = tuple(document.stratum for document, _ in found if document.stratum is not None)
    return Part(examples, strata or None)


def _read(config: DataConfig, side: str) -> Documents:
    """One side's documents. What train is, text files or a table, the other sides are too."""
    if side == "train" and config.source == STDLIB:
        entries = [Document(name, text) for name, text in read_sources(pretraining=False)]
        return Documents(entries, "top-level module")
    files = None if config.source == STDLIB else find_texts(config.source, "data.source")
    if config.source != STDLIB and files is None:
        return _read_table(config, side)
    key, given = ("data.source", config.source) if side == "train" else (f"data.{side}", getattr(config, side))
    files = files if side == "train" else find_texts(given, key)
    if files is None:
        raise DataError(f"{key} is {given!r}, but data.source is text: give a text file, a folder or a pattern of them")
    return _read_files(files, given, key)


def _read_table(config: DataConfig, side: str) -> Documents:
    """Each row is a document."""
    table = read_rows(config, side)
    group, stratum = group_column(config, side, table.column_names), stratum_column(config, table.column_names)
    wanted = {"data.text": config.text, "data.label": stratum, "data.group": group}
    keys = {column: key for key, column in wanted.items() if column is not None}
    columns = text_columns(table, where(config, side), keys)
    documents = Documents([], group or "")
    for row in range(len(table)):
        if not dropped_for(columns, row, side, documents.counts):
            group_of = None if group is None else columns[group][row]
            stratum_of = None if stratum is None else columns[stratum][row]
            documents.entries.append(Document(group_of, columns[config.text][row], stratum_of))
    return documents


def find_texts(source: str, key: str) -> TextFiles | None:
    """Returns the text files of a file, folder or pattern; None where there is none such, or it is one of tables.

    A folder or pattern is what most of its files are, by their names; the others are passed over.

    Raises:
        DataError: The source is named like a text file, and does not exist.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        root, files = path, list(_below(path))
    elif path.exists():
        root, files = path.parent, [path]
    elif _is_pattern(source):
        root = Path(*takewhile(lambda part: not _is_pattern(part), path.parts))
        files = [file for name in sorted(glob(str(path), recursive=True)) if (file := Path(name)).is_file()]
    elif source.lower().endswith(TEXT_SUFFIXES):
        raise DataError(f"{key} is {source!r}, but there is no such file")
    else:
        return None
    texts = [file for file in files if not file.name.lower().endswith(TABLES)]
    tables = len(files) - len(texts)
    return TextFiles(root, texts, tables) if len(texts) > tables else None


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _read_files(files: TextFiles, source: str, key: str) -> Documents:
    """Each text file is a document of what lies directly below the root, itself or a folder."""
    documents = Documents([], IN_FILES)
    if files.tables:
        documents.counts["tables passed over"] = files.tables
    for file in files.texts:
        text = _text(file, key)
        if text is None:
            documents.counts["files that are not UTF-8 text, passed over"] += 1
        elif text.strip():
            documents.entries.append(Document(file.relative_to(files.root).parts[0], text))
        else:
            documents.counts["empty files, passed over"] += 1
    if not documents.entries:
        raise DataError(
            f"{key} is {source!r}, but holds no usable text. Found {listed(documents.counts)}; save text as UTF-8"
        )
    return documents


def _text(path: Path, key: str) -> str | None:
    """What a file holds; None where that is not text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror or error}") from None
    try:
        return None if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, in a fixed order, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        yield from (file for file in visible if file.is_file())
