"""The second built-in task: to which chapter of the Python Library Reference does this paragraph belong?

Paragraphs of docstrings are labelled by the chapter that describes their module; the module's own names are
masked. The reference's chapters are joined to twelve with enough text each. Modules that Python 3.12 and 3.13
removed are not used, so every supported Python has the same classes.

Topics do not carry over to unseen modules, so the split is by paragraph: a module may stand on all sides.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fslora.config import DataConfig
from fslora.data.partition import stratified_shares
from fslora.data.stdlib import Docstring, read_library
from fslora.data.text import is_prose, letters, paragraphs
from fslora.data.types import Dataset, Examples
from fslora.rng import Rng

CHAPTERS = {
    "Text and Codecs": "string re difflib textwrap stringprep rlcompleter codecs encodings locale gettext struct",
    "Data Types": "datetime _pydatetime _strptime zoneinfo calendar collections _collections_abc heapq "
    "bisect weakref _weakrefset types copy pprint reprlib enum graphlib functools operator",
    "Numbers and Mathematics": "numbers decimal _pydecimal fractions random statistics colorsys secrets _pylong",
    "Files, Persistence and Formats": "pathlib posixpath ntpath genericpath fileinput stat filecmp "
    "tempfile glob fnmatch linecache shutil pickle copyreg shelve dbm sqlite3 gzip bz2 lzma zipfile "
    "tarfile _compression compression csv configparser tomllib netrc plistlib",
    "Operating System": "os io _pyio time logging platform argparse optparse getopt getpass curses "
    "ctypes cmd shlex pty tty _osx_support _aix_support",
    "Concurrency": "threading _threading_local multiprocessing concurrent subprocess sched queue contextvars",
    "Networking": "asyncio socket ssl selectors signal socketserver ipaddress",
    "Internet Data and Markup": "email json mailbox mimetypes base64 quopri html xml hashlib hmac _markupbase",
    "Internet Protocols": "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib uuid xmlrpc nturl2path",
    "Graphics and Editor": "tkinter turtle turtledemo idlelib",
    "Development and Debugging": "typing pydoc doctest unittest bdb pdb timeit trace tracemalloc "
    "profile cProfile profiling pstats ensurepip venv zipapp",
    "Runtime and Language": "sysconfig warnings dataclasses contextlib abc _py_abc traceback inspect "
    "site _sitebuiltins annotationlib __future__ code codeop zipimport pkgutil modulefinder runpy "
    "importlib ast _ast_unparse symtable token tokenize keyword tabnanny pyclbr py_compile compileall "
    "dis opcode pickletools _pyrepl",
}
"""Class → its top-level modules."""
CHAPTER_OF = {module: label for label, modules in enumerate(CHAPTERS.values()) for module in modules.split()}
MASK = "[module]"
MIN_WORDS, MAX_WORDS = 6, 120


def load_chapters(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task on the running Python's standard library, split by paragraph, stratified by class."""
    library = read_library()
    counts: Counter[str] = Counter()
    examples = _examples(library.docstrings, counts)
    shares = (config.test_share, config.validation_share)
    test, validation, train = stratified_shares(examples.labels, shares, rng.child("sides"))
    sizes = np.bincount(examples.labels, minlength=len(CHAPTERS)).tolist()
    statistics: dict[str, int | float | str] = {
        "source": f"standard library of Python {platform.python_version()}",
        "files read": library.files,
        "files that could not be parsed": library.unreadable,
        "docstrings": len(library.docstrings),
        **counts,
        "paragraphs used": len(examples),
        "groups (top-level modules)": len(set(examples.groups or ())),
        **{f"class {name}": size for name, size in zip(CHAPTERS, sizes, strict=True)},
    }
    return Dataset(
        name="chapters",
        label_names=tuple(CHAPTERS),
        train=examples.take(train),
        validation=examples.take(validation),
        test=examples.take(test),
        statistics=statistics,
    )


def _examples(docstrings: Sequence[Docstring], counts: Counter[str]) -> Examples:
    """The usable paragraphs; of those made of the same letters only the first is used."""
    seen: set[str] = set()
    rows: list[tuple[str, int, str]] = []
    for docstring in docstrings:
        label = CHAPTER_OF.get(docstring.top_level)
        for paragraph in paragraphs(docstring.text):
            text = masked(paragraph, docstring.module)
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
    texts, labels, groups = zip(*rows, strict=True)
    return Examples(texts, np.array(labels, dtype=np.int64), groups=groups)


def masked(text: str, module: str) -> str:
    """Returns the text with the module's dotted name and every piece of it replaced by MASK, in any case.

    Underscores count for nothing: ``_pydecimal`` masks 'pydecimal' and 'decimal'.
    """
    pieces = {piece.strip("_") for piece in module.split(".")}
    pieces |= {piece.removeprefix("_py").strip("_") for piece in module.split(".")}
    names = [module, *sorted(pieces - {""}, key=len, reverse=True)]
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"(?<![^\W_])_*({pattern})_*(?![^\W_])", MASK, text, flags=re.IGNORECASE)
