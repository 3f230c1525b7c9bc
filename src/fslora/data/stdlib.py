"""The running Python's standard library as text that every installation carries: its docstrings, or its sources.

Files are parsed or read, never imported. Tests, bundled wheels, installed packages and generated files are left out.

For language modelling the library is cut in two by package: one half's sources pretrain a small base, the other
half's fine-tune it, so that no file a client holds was in the base's text (``pretraining_share``). What the halves
still share is single lines, such as licences and idioms: 1.5 % of the lines of 40 characters or more.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fslora.errors import DataError

_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "lib-dynload"}
)
_LEFT_OUT_STARTS = ("config-", "_sysconfigdata", "__phello__", "__hello__")
_TABLES = ("encodings", "pydoc_data", "stringprep.py", "html/entities.py", "re/_casefix.py")
"""Sources that a program wrote: code pages, character tables, the help texts as escaped strings."""
_PRIVATE_PREFIX = re.compile(r"^_+(?:py_?)?")
"""What the name of a helper or of a pure-Python twin adds: '_pydecimal' to 'decimal', '_py_abc' to 'abc'."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring and where it stands."""

    module: str
    """Dotted name of its module, e.g. 'xml.dom.minidom'."""
    text: str
    """Without the indentation of the code around it."""

    @property
    def top_level(self) -> str:
        """The module's first piece, e.g. 'xml'."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Library:
    """What was read from one standard library."""

    docstrings: tuple[Docstring, ...]
    """In the order of file names and lines."""
    files: int
    unreadable: int
    """Source files that could not be parsed."""


def read_library(root: Path | None = None) -> Library:
    """Returns the docstrings under ``root``, by default the running Python's standard library.

    Raises:
        DataError: There are no source files, as in a Python that is shipped as a zip archive.
    """
    root = _root(root)
    files = _found_files(root)
    docstrings: list[Docstring] = []
    unreadable = 0
    with _no_cycle_search():
        for path in files:
            try:
                tree = _parsed(path)
            except (OSError, SyntaxError, ValueError):
                unreadable += 1
                continue
            module = _module_name(path.relative_to(root))
            docstrings.extend(Docstring(module, text) for text in _docstrings(tree))
    return Library(tuple(docstrings), len(files), unreadable)


def pretraining_share(name: str) -> bool:
    """Returns whether a top-level module belongs to the pretraining half; all others are for fine-tuning.

    The side is the lowest bit of the first byte of the SHA-256 of the name (even: pretraining), so it is the same in
    every Python, whatever else is installed. A helper is where its public twin is ('_pydecimal' with 'decimal'): the
    two share sentences, so leading underscores, and 'py' behind them, are no part of the name that is hashed.
    """
    family = _PRIVATE_PREFIX.sub("", name)
    return hashlib.sha256(family.encode()).digest()[0] % 2 == 0


def read_sources(pretraining: bool, root: Path | None = None) -> list[tuple[str, str]]:
    """Returns the source files of one half of the library, docstrings and comments included.

    Args:
        pretraining: Which half, as ``pretraining_share`` says.
        root: By default the running Python's standard library.

    Returns:
        (top-level module, text) in the order of file names; a package has several files. Empty files, those that
        are not UTF-8 and those that a program wrote are left out.

    Raises:
        DataError: There are no source files, as in a Python that is shipped as a zip archive.
    """
    root = _root(root)
    sources: list[tuple[str, str]] = []
    for path in _found_files(root):
        place = path.relative_to(root)
        top_level = _module_name(place).partition(".")[0]
        if pretraining_share(top_level) == pretraining and not place.as_posix().startswith(_TABLES):
            text = _utf8(path)
            if text.strip():
                sources.append((top_level, text))
    return sources


def _root(root: Path | None) -> Path:
    return Path(sysconfig.get_path("stdlib")) if root is None else root


def _found_files(root: Path) -> list[Path]:
    files = list(_source_files(root))
    if not files:
        raise DataError(
            f"the source is 'stdlib', but there are no .py files under {root}; this Python comes without "
            "the sources of its library. Give a text file or folder as the source"
        )
    return files


def _utf8(path: Path) -> str:
    """The text of a file with plain line ends; nothing where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""


@contextmanager
def _no_cycle_search() -> Iterator[None]:
    """Stops the search for reference cycles: trees have none, and beside torch it takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if _wanted(name))
        for name in sorted(names):
            if name.endswith(".py") and _wanted(name):
                yield Path(folder, name)


def _wanted(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_STARTS)


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # what an invalid escape gives before Python 3.12
        return ast.parse(path.read_bytes())


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Yields docstrings in source order; only blocks are searched, as expressions hold none."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Documented):
            text = ast.get_docstring(node)
            if text:
                yield text
        for name in ("finalbody", "orelse", "cases", "handlers", "body"):
            pending.extend(reversed(getattr(node, name, ())))
