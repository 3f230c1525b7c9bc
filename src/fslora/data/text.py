"""From raw text to clean paragraphs and sentences: prose is kept, code, markup and tables are left out.

The text may be a docstring, plain text, Markdown or reStructuredText; it is read line by line with a few
rules that all of these share, so nobody has to say which it is.
"""

from __future__ import annotations

import re

_FENCE = re.compile(r"^(```|~~~)")
_SKIPPED = re.compile(r"^(#|\||\.\. |:\w[^:]*:|@\w|\$ )")
"""Headings, table rows, directives, fields, decorators and shell lines: breaks between paragraphs."""
_BULLET = re.compile(r"^([-*+•]|\(?(\d+|[a-zA-Z])[.)])\s+")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ROLE = re.compile(r":[a-z:]+:(?=`)")
_UNDERSCORED = re.compile(r"(?<!\w)_([^\W_]+)_(?!\w)")
_EMPHASIS = re.compile(r"`+|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_SENTENCE_END = re.compile(r"""[.!?…]+["')\]”’»]*\s+""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:[A-Z]|(?i:e\.g|i\.e|vs|cf|ca|approx|resp|incl)|Fig|No|Mr|Mrs|Ms|Dr|Prof|St)\.\s+$"
)
_ENDS_SENTENCE = re.compile(r"""[.!?…]["')\]”’»]*$""")
_PLAIN_WORD = re.compile(r"""^["'(\[“‘«]*[^\W\d_]+(['’-][^\W\d_]+)*["')\]”’»]*[.,;:!?…]*["')\]”’»]*$""")

PLAIN_SHARE = 0.8
"""Prose has at least this share of plain words: letters, with punctuation around them at most."""


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of a text, each on one line with single spaces.

    A blank line, a line without letters or a skipped line ends a paragraph, and a list item starts one.
    Fenced code and blocks that hold a doctest prompt are left out; links and emphasis keep only their words.
    """
    blocks: list[list[str]] = [[]]
    fenced = False
    for line in map(str.strip, text.splitlines()):
        if _FENCE.match(line):
            fenced = not fenced
        elif line.startswith(">>>"):
            blocks[-1].append(line)
            continue
        if fenced or _breaks(line):
            blocks.append([])
        elif _BULLET.match(line):
            blocks.append([_BULLET.sub("", line)])
        else:
            blocks[-1].append(line)
    doctest_free = (block for block in blocks if not any(line.startswith(">>>") for line in block))
    cleaned = (" ".join(_unmarked(" ".join(block)).split()) for block in doctest_free)
    return [paragraph for paragraph in cleaned if paragraph]


def sentences(paragraph: str) -> list[str]:
    """Returns the sentences of one paragraph, in order.

    A sentence ends at a full stop, question or exclamation mark before white space, unless the next character
    is a lower-case letter or the stop belongs to a common abbreviation or an initial.
    """
    found: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        inside = paragraph[end.end() :][:1].islower() or _ABBREVIATION.search(paragraph[start : end.end()])
        if not inside:
            found.append(paragraph[start : end.end()].strip())
            start = end.end()
    found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def is_prose(text: str) -> bool:
    """Returns whether at least ``PLAIN_SHARE`` of the words are plain words."""
    words = text.split()
    return sum(bool(_PLAIN_WORD.match(word)) for word in words) >= PLAIN_SHARE * max(1, len(words))


def is_sentence(text: str) -> bool:
    """Returns whether this is prose that starts like a sentence and ends like one."""
    first = text.lstrip("\"'([“‘«")[:1]
    return first.isalnum() and not first.islower() and bool(_ENDS_SENTENCE.search(text)) and is_prose(text)


def letters(text: str) -> str:
    """Returns the text's letters alone, case folded: equal for texts that differ in nothing else."""
    return "".join(character for character in text.casefold() if character.isalpha())


def _breaks(line: str) -> bool:
    return bool(_SKIPPED.match(line)) or not any(character.isalpha() for character in line)


def _unmarked(text: str) -> str:
    words_only = _ROLE.sub("", _LINK.sub(r"\1", text))
    return _EMPHASIS.sub("", _UNDERSCORED.sub(r"\1", words_only))
