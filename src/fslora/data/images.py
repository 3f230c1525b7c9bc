"""Classify images: a folder with one sub-folder per class, or tables with a column of paths and one of classes.

A folder is always read as classes, or, where data.labels tells these, as a folder of such folders, one for each client,
whose name is then the group of its images. Tables are named as a file, or as a pattern of files. Their paths are
relative to the folder of the table. Every image is decoded once, so that a damaged one is found before training and not
in it.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fslora.config import DataConfig
from fslora.data.readers import suffix_of
from fslora.data.rows import (
    Columns,
    Dropped,
    Table,
    Task,
    class_cell,
    files_read,
    optional,
    picked,
    read_table,
    where_known,
)
from fslora.data.sources import FILE, files_by_name
from fslora.data.table import class_names
from fslora.data.types import Dataset, Examples
from fslora.errors import DataError
from fslora.rng import Rng

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""The files of a class's folder that are images."""


def load_images(config: DataConfig, rng: Rng) -> Dataset:
    """Returns the task; texts are absolute paths. Images that are missing or cannot be decoded are counted.

    Raises:
        DataError: A side cannot be read or has no usable images, or there are fewer than two classes.
    """
    dropped: Dropped = Counter()
    digests: dict[str, str] = {}
    rows, declared = _read(config, "train", dropped, digests)
    names = class_names(rows["label"], declared, f"data.source {config.source!r}", dropped, config.labels)

    def own(side: str) -> Examples:
        found, _ = _read(config, side, dropped, digests)
        return _examples(where_known(found, set(names), side, dropped), names)

    return Task(
        config,
        "images",
        names,
        _examples(rows, names),
        own,
        {**({} if _is_folder(config.source) else files_read(config)), "classes": len(names)},
        lambda examples: [digests[path] for path in examples.texts],
        inputs="images",
    ).dataset(dropped, rng)


def _read(
    config: DataConfig, side: str, dropped: Dropped, digests: dict[str, str]
) -> tuple[Columns, tuple[str, ...] | None]:
    """The rows of a side whose images can be decoded, and the classes that a table declares."""
    source = config.source if side == "train" else getattr(config, side)
    if _is_folder(source):
        rows, declared = _of_folder(Path(source).expanduser(), config, side), None
    else:
        rows, declared = _of_tables(config, side, dropped)
    kept = []
    for i, path in enumerate(rows["text"]):
        digest, fault = _checked(path)
        if digest is None:
            dropped[f"{side} images dropped: {fault}"] += 1
            continue
        digests[path] = digest
        kept.append(i)
    if rows["text"] and not kept:
        raise DataError(
            f"none of the {len(rows['text'])} images of {source} can be used, e.g. {rows['text'][0]}: "
            f"{_checked(rows['text'][0])[1]}. Paths in a table are relative to the table's folder"
        )
    return picked(rows, kept), declared


def _is_folder(source: str) -> bool:
    return Path(source).expanduser().is_dir()


def _of_folder(folder: Path, config: DataConfig, side: str) -> Columns:
    key = "data.source" if side == "train" else f"data.{side}"
    if config.group is not None:
        raise DataError(
            f"data.group is {config.group!r}, but {key} {str(folder)!r} is a folder of images, which has no columns. "
            "Remove data.group, or give a table with the images' paths, classes and owners"
        )
    inner = _folders(folder)
    clients = [each for each in inner if any(entry.name in (config.labels or ()) for entry in _folders(each))]
    if clients and not any(each.name in (config.labels or ()) for each in inner):
        parts = [(owner.name, entry) for owner in clients for entry in _folders(owner)]
    else:
        clients, parts = [], [("", entry) for entry in inner]
    found = [(str(path), entry.name, owner) for owner, entry in parts for path in _images_below(entry)]
    if not found:
        raise DataError(
            f"{key} is {str(folder)!r}, a folder without images ({', '.join(SUFFIXES)}) in sub-folders; data.task "
            "'images' needs one sub-folder per class, or, with data.labels, a folder of these for each client. A table "
            "of paths is named as a file, or a pattern of files"
        )
    columns = {"text": [path for path, _, _ in found], "label": [name for _, name, _ in found]}
    return {**columns, "group": [owner for _, _, owner in found]} if clients else columns


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder by their names, without hidden ones."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_below(folder: Path) -> list[Path]:
    """The images in a folder and all below it, sorted, absolute; hidden files and folders are passed over."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name).absolute() for name in names if not name.startswith(".")]
    return sorted(path for path in found if suffix_of(path, SUFFIXES))


def _of_tables(config: DataConfig, side: str, dropped: Dropped) -> tuple[Columns, tuple[str, ...] | None]:
    files = files_by_name(config, side)
    table = read_table(config, side, keys=("text", "label"))
    if "" not in files:
        table = Table(table.rows, side, {**table.used, "file": FILE})
    declared = table.declared("label")
    rows = table.usable({"label": class_cell(declared)}, dropped)
    owners = rows.pop("file", [""] * len(rows["text"]))
    folders = {name: path.absolute().parent for name, path in files.items()}
    rows["text"] = [os.path.normpath(folders[owner] / path) for owner, path in zip(owners, rows["text"], strict=True)]
    return rows, declared


def _checked(path: str) -> tuple[str | None, str]:
    """The SHA-256 of an image's file, in hex; or None, and what is wrong with it."""
    from PIL import Image

    try:
        content = Path(path).read_bytes()
    except OSError:
        return None, "no such file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large or oddly encoded images, which can be read all the same
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (1, 1))  # JPEG: decodes all, but computes an eighth of the resolution
                image.load()
    except Exception:  # decoders raise what they like
        return None, "damaged, or no image"
    return hashlib.sha256(content).hexdigest(), ""


def _examples(rows: Columns, names: Sequence[str]) -> Examples:
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[label] for label in rows["label"]], dtype=np.int64)
    return Examples(tuple(rows["text"]), labels, groups=optional(rows, "group"))
