"""Text for a base from nothing, and the tokenizer made of it: reading, holding out, byte-level BPE, rows of tokens.

Whole files are held out. The others become one stream of tokens, a begin and an end token around each file, cut into
rows that overlap by one token, so that every token but the first is predicted exactly once.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fslora.data.stdlib import read_sources
from fslora.data.word_order import read_path
from fslora.rng import Rng
from fslora.types import Tensor

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIALS = (BEGIN, END, PAD)
FEWEST_TOKENS = 256 + len(SPECIALS)
"""Every byte has a token, and so have begin, end and padding; the learned ones come on top."""
PIECES = 20
"""A file with more than one part in so many of all characters is cut: it could not be held out as a whole."""


def read_texts(source: str) -> tuple[list[str], str]:
    """Returns the texts of a source, one per file, and what they are in words.

    Raises:
        DataError: The source cannot be read, or holds no text.
    """
    if source == "stdlib":
        sources = read_sources(pretraining=True)
        modules = sorted({name for name, _ in sources})
        return [text for _, text in sources], (
            f"the sources, docstrings included, of {len(modules)} of the packages and modules of the standard library "
            f"of Python {platform.python_version()}: {', '.join(modules)}. They are the half for which "
            "`fslora.data.stdlib.pretraining_share` is true; the other half was not read, and is there for fine-tuning"
        )
    path = Path(source).expanduser()
    texts = [text for _, text in read_path(path, "--source").texts]
    return texts, f"{len(texts)} text file(s) from {path.name}"


def hold_out(texts: Sequence[str], share: float, rng: Rng) -> tuple[list[str], list[str]]:
    """Returns the texts to train on, and drawn whole texts that hold at least ``share`` of all characters.

    Both are in the given order. Long texts (``PIECES``) are cut first.
    """
    pieces = _in_pieces(texts)
    wanted = share * sum(map(len, pieces))
    chosen: set[int] = set()
    for i in rng.numpy().permutation(len(pieces))[1:]:  # one is left to train on, whatever the share
        if wanted <= 0:
            break
        chosen.add(int(i))
        wanted -= len(pieces[i])
    return (
        [piece for i, piece in enumerate(pieces) if i not in chosen],
        [piece for i, piece in enumerate(pieces) if i in chosen],
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Returns a byte-level BPE tokenizer of at most ``vocabulary`` tokens, as a transformers fast tokenizer.

    Every byte has a token, so any text survives encoding and decoding as it is. The begin token is put before each
    text; begin, end and padding are three different tokens, the first ones.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B:1", special_tokens=[(BEGIN, SPECIALS.index(BEGIN))]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encoded(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Returns the token numbers [n] of all texts as one stream, each between a begin and an end token."""
    stream: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    for text in texts:
        numbers = tokenizer.backend_tokenizer.encode(text).ids  # the begin token comes first
        stream.append(torch.tensor([*numbers, tokenizer.eos_token_id]))
    return torch.cat(stream)


def in_rows(tokens: Tensor, sequence: int) -> Tensor:
    """Returns a stream [n] cut into rows [m sequence+1]; what fills no row is left out.

    A row's last token is the next one's first: inputs are ``row[:-1]``, targets ``row[1:]``.
    """
    return tokens.unfold(0, sequence + 1, sequence) if len(tokens) > sequence else tokens.new_zeros(0, sequence + 1)


def _in_pieces(texts: Sequence[str]) -> list[str]:
    """The texts, long ones cut at line ends or, where a line alone is too long, within it."""
    size = max(1, sum(map(len, texts)) // PIECES)
    pieces: list[str] = []
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), size):
                piece += line[start : start + size]
                if len(piece) >= size:
                    pieces.append(piece)
                    piece = ""
        pieces += [piece] if piece else []
    return pieces
