"""Answers in free text: what may be chosen, what was chosen, and whether it is right. Pure text, exact numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

Extract = Literal["choice", "number", "text"]

ANSWER_FORMAT = "Answer format: "
"""What stands before the choices in prompts of the LLM-Adapters form (Hu et al., arXiv 2304.01933)."""
FINAL = "####"
"""What stands before the final number in solutions of GSM8K's form (Cobbe et al., arXiv 2110.14168)."""

_CURRENCY = re.compile(r"[$£€¥][ ]?")
_IN_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(,\d{3})+(?!\d)", re.ASCII)
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)]) [-+] )?                   # behind a word or a number it is a hyphen or an operator
    (?: (?<![\d./]) (?P<over>\d{1,15}) / (?P<under>(?=\d*[1-9])\d{1,15}) (?! \d | / | \.\d )   # no date
      | (?P<whole>\d+) (\.(?P<decimals>\d+))?
      | \.(?P<bare>\d+)
    )
    """,
    re.ASCII | re.VERBOSE,
)


def choices_in(prompt: str) -> tuple[str, ...]:
    """Returns what the line of the last 'Answer format: ' offers, split at '/'; () where a prompt has none."""
    _, found, after = prompt.rpartition(ANSWER_FORMAT)
    return listed_choices((after.splitlines() or [""])[0]) if found else ()


def listed_choices(text: str) -> tuple[str, ...]:
    """Returns the choices of 'a/b/c', without the white space around them."""
    return tuple(choice for piece in text.split("/") if (choice := piece.strip()))


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that the text names first, as whole words in any case; of two at one place the longer."""
    named = ((_place(text, choice), -len(choice), choice) for choice in choices)
    places = [(start, shorter, choice) for start, shorter, choice in named if start is not None]
    return min(places, key=lambda place: place[:2])[2] if places else None


def last_number(text: str) -> str | None:
    """Returns the first number after the last '####', or without that mark the last number; None if there is none.

    Equal numbers are equal texts: '$1,000.00', '+1000.' and '2000/2' are all '1000', '-.50' is '-0.5'. A fraction of
    two whole numbers is one number, '6/8' = '0.75', and in lowest terms where its decimals never end, '2/6' = '1/3'.
    A date such as 1/2/2024 is three numbers. Powers of ten (1e5), percent signs and units are not read.
    """
    _, marked, after = text.rpartition(FINAL)
    plain = _CURRENCY.sub("", (after if marked else text).replace("−", "-"))
    plain = _IN_THOUSANDS.sub(lambda number: number[0].replace(",", ""), plain)
    numbers = [_normal(match) for match in _NUMBER.finditer(plain)]
    if not numbers:
        return None
    return numbers[0] if marked else numbers[-1]


def found(extract: Extract, text: str, choices: Sequence[str], answer: str) -> bool:
    """Returns whether a generated text gives the right answer.

    Args:
        extract: What is looked for: the choice named first, the last number, or the whole text.
        text: What the model wrote.
        choices: What could be chosen, for 'choice'.
        answer: What is right; a whole sentence or solution is searched for its choice or number as the text is.
    """
    read = _READERS[extract]
    given = read(text, choices)
    return given is not None and given == read(answer, choices)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


_READERS: Mapping[str, Callable[[str, Sequence[str]], str | None]] = {
    "choice": first_choice,
    "number": lambda text, _: last_number(text),
    "text": lambda text, _: _folded(text),
}


def _place(text: str, choice: str) -> int | None:
    """Where the choice is named first; any white space will do between its words."""
    words = r"\s+".join(map(re.escape, choice.split()))
    match = re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) if words else None
    return match.start() if match else None


def _normal(match: re.Match[str]) -> str:
    part = match.groupdict(default="")
    if part["over"]:
        number = _quotient(int(part["over"]), int(part["under"]))
    else:
        whole, decimals = part["whole"].lstrip("0") or "0", (part["decimals"] or part["bare"]).rstrip("0")
        number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if part["sign"] == "-" and number != "0" else number


def _quotient(over: int, under: int) -> str:
    """As decimals where they end, else in lowest terms."""
    value = Fraction(over, under)
    places = next((n for n in range(50) if 10**n % value.denominator == 0), None)
    if places is None:
        return str(value)
    digits = str(value.numerator * 10**places // value.denominator).zfill(places + 1)
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits
