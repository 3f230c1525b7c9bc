"""Texts as token ids, once: large sets are kept on disk, under a name made of everything that they depend on.

Below CACHED_CHARACTERS tokenising takes less than about a second, and nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

CACHED_CHARACTERS = 2_000_000
FORMAT = "1"
Fields = dict[str, list[list[int]]]


def tokenised(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
    specials: bool = True,
) -> Fields:
    """Returns the tokenizer's fields, one list of ids per text.

    Args:
        tokenizer: A transformers tokenizer.
        texts: At least one.
        pairs: The second text of each.
        max_length: Cut to so many tokens; None: as long as they are.
        specials: Whether the tokenizer adds its special tokens.
    """
    characters = sum(map(len, texts)) + sum(map(len, pairs or ()))
    path = _cache_file(tokenizer, texts, pairs, max_length, specials) if characters >= CACHED_CHARACTERS else None
    if path and (kept := _read(path)) is not None:
        return kept
    kwargs: dict[str, Any] = {"add_special_tokens": specials, "return_attention_mask": False, "verbose": False}
    if max_length is not None:
        kwargs |= {"truncation": True, "max_length": max_length}
    fields = dict(tokenizer(list(texts), None if pairs is None else list(pairs), **kwargs))
    if path:
        _write(path, fields)
    return fields


def cache_folder() -> Path:
    """Returns where tokens are kept: ``$FSLORA_CACHE``, or ``fslora`` in the user's cache folder."""
    if given := os.environ.get("FSLORA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fslora"


def _cache_file(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None, specials: bool
) -> Path | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer cannot be told from another one by its content
        return None
    digest = hashlib.sha256()
    for part in (FORMAT, backend.to_str(), repr((max_length, specials, pairs is None, len(texts)))):
        _feed(digest, part)
    for column in (texts, pairs or ()):
        for text in column:
            _feed(digest, text)
    return cache_folder() / "tokens" / f"{digest.hexdigest()}.safetensors"


def _feed(digest: Any, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _read(path: Path) -> Fields | None:
    """The fields of a cache file; None where there is none, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
        names = [name.removesuffix(".ids") for name in stored if name.endswith(".ids")]
        return {
            name: [part.tolist() for part in np.split(stored[f"{name}.ids"], stored[f"{name}.ends"][:-1])]
            for name in names
        }
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(path: Path, fields: Fields) -> None:
    """Keeps the fields; a cache that cannot be written is no reason to stop."""
    from safetensors.numpy import save_file

    stored = {}
    for name, lists in fields.items():
        stored[f"{name}.ids"] = np.fromiter((i for ids in lists for i in ids), dtype=np.int32)
        stored[f"{name}.ends"] = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            partial = Path(file.name)
        save_file(stored, partial)
        os.replace(partial, path)
