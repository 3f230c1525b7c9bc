"""The second built-in task: to which chapter of the Python Library Reference does this paragraph belong?

Paragraphs of docstrings are labelled by the chapter that describes their module; the module's own names are masked.
The reference's chapters are joined to twelve with enough text each. Modules that Python 3.12 and 3.13 removed are
not used, so every supported Python has the same classes.

Topics do not carry over to unseen modules, so the split is by paragraph: a module may stand on all sides.
"""

from __future__ import annotations

import platform
import re
from collections import Counter

import numpy as np

from fslora.config import DataConfig
from fslora.data.partition import stratified_shares
from fslora.data.stdlib import Docstring, read_library
from fslora.data.text import is_prose, letters, paragraphs
from fslora.data.types import Dataset, Examples
from fslora.rng import Rng

CHAPTERS = {
    "Text and Codecs": "string re difflib textwrap stringprep rlcompleter codecs encodings locale gettext struct",
    "Data Types": "datetime _pydatetime _strptime zoneinfo calendar collections _collections_abc heapq bisect weakref "
    "_weakrefset types copy pprint reprlib enum graphlib functools operator",
    "Numbers and Mathematics": "numbers decimal _pydecimal fractions random statistics colorsys secrets _pylong",
    "Files, Persistence and Formats": "pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob "
    "fnmatch linecache shutil pickle copyreg shelve dbm sqlite3 gzip bz2 lzma zipfile tarfile _compression "
    "compression csv configparser tomllib netrc plistlib",
    "Operating System": "os io _pyio time logging platform argparse optparse getopt getpass curses ctypes cmd shlex "
    "pty tty _osx_support _aix_support",
    "Concurrency": "threading _threading_local multiprocessing concurrent subprocess sched queue contextvars",
    "Networking": "asyncio socket ssl selectors signal socketserver ipaddress",
    "Internet Data and Markup": "email json mailbox mimetypes base64 quopri html xml hashlib hmac _markupbase",
    "Internet Protocols": "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib uuid xmlrpc nturl2path",
    "Graphics and Editor": "tkinter turtle turtledemo idlelib",
    "Development and Debugging": "typing pydoc doctest unittest bdb pdb timeit trace tracemalloc profile cProfile "
    "profiling pstats ensurepip venv zipapp",
    "Runtime and Language": "sysconfig warnings dataclasses contextlib abc _py_abc traceback inspect site _sitebuiltins "
    "annotationlib __future__ code codeop zipimport pkgutil modulefinder runpy importlib ast _ast_unparse symtable "
    "token tokenize keyword tabnanny pyclbr py_compile compileall dis opcode pickletools _pyrepl",
}
"""Class → its top-level modules."""
CHAPTER_OF = {module: label for label, modules in enumerate(CHAPTERS.values()) for module in modules.split()}
MASK = "[module]"
MIN_WORDS, MAX_WORDS = 6, 120


def load_chapters(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on the running Python's standard library, split by paragraph and stratified by chapter."""
    library = read_library()
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    rows: list[tuple[str, int, str]] = []
    for docstring in library.docstrings:
        label = CHAPTER_OF.get(docstring.top_level)
        for paragraph in paragraphs(docstring.text):
            text = masked(paragraph, docstring)
            key = letters(text)
            counts["paragraphs found"] += 1
            if label is None:
                counts["dropped: module in no chapter"] += 1
            elif not MIN_WORDS <= len(text.split()) <= MAX_WORDS or not is_prose(paragraph):
                counts[f"dropped: not prose of {MIN_WORDS} to {MAX_WORDS} words"] += 1
            elif key in seen:
                counts["dropped: near-duplicate"] += 1
            else:
                seen.add(key)
                rows.append((text, label, docstring.top_level))
    examples = Examples(
        tuple(text for text, _, _ in rows),
        np.array([label for _, label, _ in rows], dtype=np.int64),
        groups=tuple(group for _, _, group in rows),
    )
    test, validation, train = stratified_shares(
        examples.labels, (config.test_share, config.validation_share), rng.child("sides")
    )
    statistics: dict[str, int | float | str] = {
        "source": f"standard library of Python {platform.python_version()}",
        "files read": library.files,
        "files that could not be parsed": library.unreadable,
        "docstrings": len(library.docstrings),
        **counts,
        "paragraphs used": len(examples),
        "groups": len(set(examples.groups or ())),
        **{f"class {name}": int((examples.labels == i).sum()) for i, name in enumerate(CHAPTERS)},
    }
    return Dataset(
        "chapters",
        tuple(CHAPTERS),
        examples.take(train),
        examples.take(validation),
        examples.take(test),
        statistics,
    )


def masked(paragraph: str, docstring: Docstring) -> str:
    """Returns the paragraph with the module's dotted name and each piece of it replaced, in any case."""
    pieces = {piece.removeprefix("_py").strip("_") for piece in docstring.module.split(".")}
    pieces |= {piece.strip("_") for piece in docstring.module.split(".")}
    names = [docstring.module, *sorted(pieces - {""}, key=len, reverse=True)]
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"(?<![^\W_])_*({pattern})_*(?![^\W_])", MASK, paragraph, flags=re.IGNORECASE)
