"""The docstrings of the running Python's standard library: text that every installation carries.

Files are parsed, never imported. Tests, bundled wheels, installed packages and generated files are left out.
"""

from __future__ import annotations

import ast
import gc
import os
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
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = list(_source_files(root))
    if not files:
        raise DataError(
            f"data.source is 'stdlib', but there are no .py files under {root}; this Python comes without "
            "the sources of its library. Give data.source a text file or folder"
        )
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
