"""Where rows come from: one file, many files, LEAF's files, or a data set of the hub; the result is one table.

A folder, or a pattern such as ``data/*/train.jsonl.gz``, stands for all its files in sorted order. Their rows are
told apart by a column ``file``, the part of each path in which the files differ: with ``data.group = "file"``, which
is the default there, every file is one site, and with ``data.label = "file"`` a Dirichlet partition skews the files.
A file's own column ``file`` gives way to that one, unless the experiment names it, which is an error.

Hidden files are passed over. Of a folder's files those of ``TABLE_SUFFIXES`` are read; where there are none, its
``.json`` files: lists of rows, or of LEAF's form (columns user, x and y; the default group is the user).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from fslora.config import TABLE_SUFFIXES, DataConfig
from fslora.data.readers import JSON_SUFFIX, is_leaf, read_file, read_hub, suffix_of
from fslora.errors import DataError

FILE, USER = "file", "user"
"""The columns that a source of many files, and a LEAF file, bring along."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERN = re.compile(r"[*?\[]")
_SUFFIXES = (*TABLE_SUFFIXES, JSON_SUFFIX)
_OPTIONAL = ("input",)
"""Columns that are empty in the files that have none: an instruction may come without an input."""


def read_rows(config: DataConfig, side: str) -> Any:
    """Returns the rows of one side as a table of the library ``datasets``, in memory.

    Args:
        config: What to read.
        side: 'train'; or 'validation' or 'test', where ``config`` names a file or split for them.

    Raises:
        DataError: There is nothing to read, it cannot be read, or the files do not fit together.
    """
    key, given = _named(config, side)
    if not is_local(config.source):
        return read_hub(config.source, config.subset, given)
    paths, many = _files(given, key)
    if not many:
        return read_file(paths[0], given, key)
    return _joined(paths, [read_file(path, str(path), key) for path in paths], config)


def where(config: DataConfig, side: str) -> str:
    """Returns how messages name the source of a side."""
    given = _named(config, side)[1]
    return given if is_local(config.source) else f"split {given!r} of {config.source!r}"


def default_group(config: DataConfig) -> str | None:
    """Returns the column that tells whose row it is: ``data.group``, or the one that the source brings along."""
    if config.group is not None or not is_local(config.source):
        return config.group
    paths, many = _files(config.source, "data.source")
    if suffix_of(paths[0], TABLE_SUFFIXES) is None and is_leaf(paths[0]):
        return USER
    return FILE if many else None


def files_by_name(config: DataConfig, side: str) -> dict[str, Path]:
    """Returns the files of a side by what the column ``file`` calls them; one file by itself is called ''.

    Raises:
        DataError: There is no such file, or the source is a hub's.
    """
    key, given = _named(config, side)
    if not is_local(config.source):
        raise DataError(
            f"data.source {config.source!r} is no file here; data.task {config.task!r} reads local files only"
        )
    paths, many = _files(given, key)
    return dict(zip(file_names(paths), paths, strict=True)) if many else {"": paths[0]}


def is_local(source: str) -> bool:
    """Returns whether a source means files here rather than a data set of the hub."""
    looks_local = source.lower().endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(source) or source.startswith(".")
    return looks_local or Path(source).expanduser().exists()


def file_names(paths: Sequence[Path]) -> list[str]:
    """Returns a short name for each file: the folders that all share, and the ending that all share, are left out.

    ``data/boolq/train.csv`` and ``data/siqa/train.jsonl`` are 'boolq' and 'siqa', ``sites/a.csv`` and ``sites/b.csv``
    are 'a' and 'b'. Different files have different names, whatever their order; suffixes stay where they are the only
    difference.
    """
    stems = [(*path.parts[:-1], _stem(path)) for path in paths]
    parts = stems if len(set(stems)) == len(set(paths)) else [path.parts for path in paths]
    start = _shared([part[:-1] for part in parts])
    parts = [part[start:] for part in parts]
    end = _shared([part[:0:-1] for part in parts]) if len(parts) > 1 else 0
    return ["/".join(part[: len(part) - end]) for part in parts]


def _shared(sequences: Sequence[Sequence[str]]) -> int:
    """How many leading entries all sequences share."""
    return sum(1 for _ in takewhile(lambda entries: len(set(entries)) == 1, zip(*sequences, strict=False)))


def _stem(path: Path) -> str:
    suffix = suffix_of(path, _SUFFIXES)
    return path.name if suffix is None else path.name[: -len(suffix)] or path.name


def _named(config: DataConfig, side: str) -> tuple[str, str]:
    """The key that names a side's rows, and what it says."""
    if side != "train":
        given = getattr(config, side)
        assert given is not None
        return f"data.{side}", given
    return ("data.source", config.source) if is_local(config.source) else ("data.train_split", config.train_split)


def _files(source: str, key: str) -> tuple[list[Path], bool]:
    """The files that a source stands for, sorted, and whether it is a folder or pattern."""
    path = Path(source).expanduser()
    forms = ", ".join(TABLE_SUFFIXES)
    if path.is_file():
        if suffix_of(path, _SUFFIXES) is None:
            raise DataError(
                f"{key} is {source!r}; a table is one file that ends in {forms} or {JSON_SUFFIX} (a list of rows, "
                "or of LEAF's form), or a folder or pattern of such files"
            )
        return [path], False
    if not source or not (path.is_dir() or _PATTERN.search(source)):
        raise DataError(f"{key} is {source!r}, but there is no such file")
    matches = [str(path)] if path.is_dir() else glob.glob(str(path), recursive=True)
    below = chain.from_iterable(_below(Path(match)) for match in matches)
    shortest_last = sorted(below, key=lambda file: (len(file.parts), file), reverse=True)
    found = sorted({file.resolve(): file for file in shortest_last}.values())  # each once, whatever links lead to it
    tables = [file for file in found if suffix_of(file, TABLE_SUFFIXES)]
    leaves = [file for file in found if suffix_of(file, [JSON_SUFFIX])]
    if not tables and not leaves:
        place = "in which" if path.is_dir() else "to which"
        raise DataError(
            f"{key} is {source!r}, {place} there is no file that ends in {forms} or {JSON_SUFFIX}; "
            "give one such file, or a folder or pattern of them"
        )
    return tables or leaves, True


def _below(path: Path) -> list[Path]:
    """The file itself, or all files below the folder that are not hidden."""
    if path.is_file():
        return [path]
    return [
        file for name in glob.glob(f"{glob.escape(str(path))}/**", recursive=True) if (file := Path(name)).is_file()
    ]


def _joined(paths: Sequence[Path], tables: Sequence[Any], config: DataConfig) -> Any:
    """One table of all rows: the columns that all files have, and the column ``file``."""
    import datasets

    used = _used_columns(config)
    _check_columns(paths, tables, used)
    names = dict.fromkeys(name for table in tables for name in table.column_names if name != FILE)
    everywhere = [n for n in names if n in _OPTIONAL or all(n in table.column_names for table in tables)]
    types = {n: kind for n in everywhere if (kind := _common_type(n, paths, tables, used)) is not None}
    if not types:
        raise DataError(
            f"the files of {config.source} have no column in common, e.g. {paths[0]} has "
            f"{', '.join(map(repr, tables[0].column_names))}. Name fewer files, or give them the same columns"
        )
    rows = {name: [cell for table in tables for cell in _cells(table, name, kind)] for name, kind in types.items()}
    named = zip(file_names(paths), tables, strict=True)
    rows[FILE] = [file_name for file_name, table in named for _ in range(len(table))]
    return datasets.Dataset.from_dict(rows, features=datasets.Features(types | {FILE: datasets.Value("string")}))


def _used_columns(config: DataConfig) -> dict[str, str]:
    """The columns that the experiment names, each with the key that names it."""
    keys = {"instruct": ("response", "answer", "choices", "group"), "text": ("text", "group")}
    of_task = keys.get(config.task, ("text", "text_pair", "label", "group"))
    used = {column: f"data.{key}" for key in of_task if isinstance(column := getattr(config, key), str)}
    if config.task in keys and config.label != DataConfig.model_fields["label"].default:
        used[config.label] = "data.label"
    if config.task == "instruct":
        used |= dict.fromkeys(["instruction", *re.findall(r"{([^{}]+)}", config.prompt)], "data.prompt")
    return used


def _check_columns(paths: Sequence[Path], tables: Sequence[Any], used: Mapping[str, str]) -> None:
    """Sees to it that a column that the experiment names is in all files or in none, and is not both kinds of file."""
    for column, key in used.items():
        owners = [path for path, table in zip(paths, tables, strict=True) if column in table.column_names]
        if owners and column == FILE:
            raise DataError(
                f"{owners[0]} has a column 'file' of its own, but {key} is 'file', which for a folder or pattern is "
                "the name of the row's file. Rename the column in the files"
            )
        lacking = [pair for pair in zip(paths, tables, strict=True) if column not in pair[1].column_names]
        if owners and lacking:
            path, table = lacking[0]
            raise DataError(
                f"{path} has no column {column!r} ({key}), but {owners[0]} has one; it has "
                f"{', '.join(map(repr, table.column_names))}. Give all files of a source the columns that are used"
            )


def _common_type(name: str, paths: Sequence[Path], tables: Sequence[Any], used: Mapping[str, str]) -> Any:
    """The type that a column has in all files; text where numbers, classes and texts meet.

    None where lists or objects differ in what they hold; that is an error if the experiment uses the column.
    """
    import datasets

    kinds: list[tuple[Any, Path]] = []  # each with the first file that has it
    for path, table in zip(paths, tables, strict=True):
        kind = table.features.get(name)
        if not _is_empty(kind) and all(kind != other for other, _ in kinds):
            kinds.append((kind, path))
    if len(kinds) < 2:
        return kinds[0][0] if kinds else next(table.features[name] for table in tables if name in table.features)
    if all(hasattr(kind, "dtype") for kind, _ in kinds):
        return datasets.Value("string")
    if name not in used:
        return None
    (kind, first), (other, second) = kinds[:2]
    raise DataError(
        f"column {name!r} ({used[name]}) holds {kind} in {first}, but {other} in {second}; make it the same in all "
        "files of a source"
    )


def _is_empty(kind: Any) -> bool:
    """Whether a column's type says that it holds nothing, or lists of nothing; or whether there is no such column."""
    return kind is None or getattr(getattr(kind, "feature", kind), "dtype", None) == "null"


def _cells(table: Any, name: str, kind: Any) -> list[Any]:
    """A column of one file as it is to be in the whole: where that is text, a declared class by its name."""
    if name not in table.column_names:
        return [None] * len(table)
    own, cells = table.features[name], table[name][:]
    if own == kind or getattr(kind, "dtype", None) != "string":
        return list(cells)
    declared = getattr(own, "names", None)
    if declared is None:
        return [None if cell is None else str(cell) for cell in cells]
    return [declared[cell] if cell in range(len(declared)) else None for cell in cells]
