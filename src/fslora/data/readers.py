"""One file, or one split of a hub data set, to a table of the library ``datasets``, in memory.

Local files are read without the network, and without leaving a cache behind.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fslora.config import TABLE_SUFFIXES
from fslora.errors import DataError

JSON_SUFFIX = ".json"
LEAF_KEYS = ("users", "num_samples", "user_data")


def suffix_of(path: Path, suffixes: Sequence[str]) -> str | None:
    """Returns the one of these suffixes that the file's name ends in, in whatever case; None for another."""
    return next((suffix for suffix in suffixes if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, shown: str, key: str) -> Any:
    """Returns the table of one CSV, JSONL, Parquet or JSON file (a list of rows, or LEAF's form).

    Args:
        path: A file that ends in one of ``TABLE_SUFFIXES`` or in ``JSON_SUFFIX``.
        shown: The file as the user wrote it, for messages.
        key: The key of the configuration that named it, for messages.

    Raises:
        DataError: The file cannot be read; the message gives the line, or the LEAF user.
    """
    suffix = suffix_of(path, (*TABLE_SUFFIXES, JSON_SUFFIX))
    assert suffix is not None
    try:
        # load_dataset would count the call at the hub even for a local file; these readers do not. They take a
        # path for a pattern, hence the escapes.
        with _quiet(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            return _FILE_READERS[suffix.removesuffix(".gz")](path, cache)
    except Exception as error:  # parsers raise what they like, wrapped by the library
        raise DataError(f"{key}: {shown} cannot be read: {_fault(path, suffix) or _innermost(error)}") from error


def read_hub(name: str, subset: str | None, split: str) -> Any:
    """Returns the table of one split of a hub data set, from the hub's own cache where it has been loaded before.

    Raises:
        DataError: There is no such data set, subset or split, or the hub is out of reach.
    """
    import datasets

    try:
        with _quiet():
            return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the network, the hub and the data set's builder raise what they like
        raise DataError(
            f"data.source {name!r} (data.subset {subset!r}, split {split!r}) is no file here and cannot be "
            f"loaded from the hub: {_first_line(error)}. Check the names and the network, or download the "
            f"data set and give its files ({', '.join(TABLE_SUFFIXES)})"
        ) from error


def _read_csv(path: Path, cache: str) -> Any:
    """Every cell is text, so 'NA', 'None' and '007' stay what they are; only an empty cell is missing."""
    import datasets

    with _opened(path) as raw:
        lines = csv.reader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
        header, first = next(lines), next(lines, None)
    if first is None:
        raise ValueError("there is no row below the header")
    if len(first) > len(header):  # pandas would take the first cells for row names
        raise ValueError(f"{len(first)} cells under {len(header)} column names; quote cells that hold a comma")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return datasets.Dataset.from_csv(
        glob.escape(str(path)),
        features=features,
        cache_dir=cache,
        keep_in_memory=True,
        keep_default_na=False,
        na_values=[""],
    )


def _read_jsonl(path: Path, cache: str) -> Any:
    import datasets

    with _opened(path) as lines:
        for line in lines:
            line.decode()  # the reader below does not look, and would fail later
    return datasets.Dataset.from_json(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True)


def _read_parquet(path: Path, cache: str) -> Any:
    import datasets

    return datasets.Dataset.from_parquet(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True)


def _read_json(path: Path, cache: str) -> Any:
    """A list of objects, one per row; or a LEAF file."""
    import datasets

    content = json.loads(path.read_bytes())
    if not isinstance(content, list):
        return datasets.Dataset.from_dict(_leaf_columns(content))
    stranger = next((place for place, row in enumerate(content, start=1) if not isinstance(row, dict)), None)
    if stranger is not None or not content:
        raise ValueError(f"entry {stranger} is no JSON object" if stranger else "it is an empty list")
    names = dict.fromkeys(name for row in content for name in row)
    return datasets.Dataset.from_dict({name: _of_one_type([row.get(name) for row in content]) for name in names})


def is_leaf(path: Path) -> bool:
    """Returns whether a .json file is one object, as LEAF's are, and not a list of rows."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


_FILE_READERS: Mapping[str, Callable[[Path, str], Any]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    JSON_SUFFIX: _read_json,
}


def _leaf_columns(content: Any) -> dict[str, list[Any]]:
    """The samples of a LEAF file, one row each: user, x (or x0, x1, ... where samples are lists) and y.

    Source: Caldas et al., arXiv 1812.01097, and the files that its preprocessing writes.
    """
    lacks = [key for key in LEAF_KEYS if key not in content] if isinstance(content, dict) else list(LEAF_KEYS)
    if lacks:
        raise ValueError(
            f"as a .json file it has to be a list of rows, or of LEAF's form, but it has no "
            f"{' and no '.join(map(repr, lacks))}"
        )
    if not all(isinstance(content[key], kind) for key, kind in zip(LEAF_KEYS, (list, list, dict), strict=True)):
        raise ValueError("'users' and 'num_samples' have to be lists, and 'user_data' an object")
    users, counts, data = [str(user) for user in content["users"]], content["num_samples"], content["user_data"]
    if len(users) != len(counts):
        raise ValueError(f"there are {len(users)} users but {len(counts)} entries of 'num_samples'")
    if strangers := sorted(data.keys() - set(users)):
        raise ValueError(f"user {strangers[0]!r} has user_data, but is not among 'users'")
    if len(set(users)) < len(users):
        raise ValueError(f"user {Counter(users).most_common(1)[0][0]!r} is listed twice in 'users'")
    rows: list[tuple[str, Any, Any]] = []
    for user, count in zip(users, counts, strict=True):
        xs, ys = _leaf_samples(user, count, data)
        rows += [(user, x, y) for x, y in zip(xs, ys, strict=True)]
    if not rows:
        raise ValueError("no user has a sample")
    return {"user": [user for user, _, _ in rows], **_leaf_inputs(rows), "y": _of_one_type([y for _, _, y in rows])}


def _leaf_samples(user: str, count: Any, data: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    samples = data.get(user)
    if not isinstance(samples, dict):
        raise ValueError(f"user {user!r} has no object in 'user_data'")
    for key in ("x", "y"):
        if not isinstance(samples.get(key), list):
            raise ValueError(f"user {user!r} has no list {key!r}")
    xs, ys = samples["x"], samples["y"]
    if len(xs) != len(ys):
        raise ValueError(f"user {user!r} has {len(xs)} entries of x, but {len(ys)} of y")
    if len(xs) != count:
        raise ValueError(f"user {user!r} has {len(xs)} samples, but 'num_samples' says {count!r}")
    return xs, ys


def _leaf_inputs(rows: Sequence[tuple[str, Any, Any]]) -> dict[str, list[Any]]:
    """The column x, or one column per place where the samples are lists of equal length."""
    widths = [len(x) if isinstance(x, list) else None for _, x, _ in rows]
    for (user, _, _), width in zip(rows, widths, strict=True):
        if width != widths[0]:
            forms = [f"a list of {form}" if form is not None else "one value" for form in (width, widths[0])]
            raise ValueError(f"user {user!r} has a sample whose x is {forms[0]}, where others have {forms[1]}")
    if widths[0] is None:
        return {"x": _of_one_type([x for _, x, _ in rows])}
    return {f"x{place}": _of_one_type([x[place] for _, x, _ in rows]) for place in range(widths[0])}


def _of_one_type(column: list[Any]) -> list[Any]:
    """The column as it is, or as text where its entries are of several types: a table's column has one."""
    types = {type(value) for value in column} - {type(None)}
    if len(types) < 2 or types == {int, float}:
        return column
    return [None if value is None else str(value) for value in column]


def _fault(path: Path, suffix: str) -> str | None:
    """What is wrong with a file that could not be read, with its place, if a look at its lines shows it."""
    start = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if ".parquet" not in suffix:
                        line.decode("utf-8-sig")
                    if ".jsonl" in suffix and line.strip() and not isinstance(json.loads(line), dict):
                        return f"line {number} is not a JSON object"
                except UnicodeDecodeError as error:
                    return f"line {number} is not UTF-8, at byte {start + error.start}; save the file as UTF-8"
                except ValueError as error:
                    return f"line {number} is not valid JSON: {error}"
                start += len(line)
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None if start else "the file is empty"


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _innermost(error: BaseException) -> str:
    """What started it all: the library wraps what its parsers raise in words of its own."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' bars, log lines and warnings; what matters is raised, and said in our words."""
    import datasets
    import huggingface_hub.utils as hub

    libraries = [(datasets.logging, datasets), (hub.logging, hub)]
    before = [(log, log.get_verbosity(), bars, bars.are_progress_bars_disabled()) for log, bars in libraries]
    for log, _, bars, _ in before:
        log.set_verbosity(log.CRITICAL)
        bars.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bars, disabled in before:
            log.set_verbosity(verbosity)
            if not disabled:
                bars.enable_progress_bars()
