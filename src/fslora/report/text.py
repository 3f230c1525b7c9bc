"""Numbers and names as the report prints them: one place for units, rounding and unfriendly characters."""

from __future__ import annotations

from math import isfinite, sqrt

NONE = "–"
"""What stands where there is no value."""

_Z95 = 1.959964


def plain(text: object, limit: int = 80) -> str:
    """Returns one line of printable text, cut to ``limit`` characters."""
    line = " ".join(str(text).split())
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def markdown_text(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#~" else char for char in text)


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share between 0 and 1 in percent."""
    return NONE if share is None or not isfinite(share) else f"{100 * share:.{digits}f} %"


def points(difference: float | None) -> str:
    """Returns the difference of two shares in percentage points, with its sign."""
    if difference is None or not isfinite(difference):
        return NONE
    shown = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if shown[1:] == "0.0" else shown


def decimal(value: float | None) -> str:
    """Returns a number with three decimals."""
    return NONE if value is None else f"{value:.3f}" if isfinite(value) else "not finite"


def count(number: int | None) -> str:
    """Returns a whole number with its thousands apart."""
    return NONE if number is None else f"{number:,}"


def counted(number: int, thing: str) -> str:
    """Returns a number of things, such as ``1 round`` or ``3 rounds``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def byte_unit(largest: float) -> tuple[float, str]:
    """Returns divisor and name of the decimal unit that suits numbers up to ``largest`` bytes."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((size, unit) for size, unit in units if largest >= size), (1.0, "B"))


def byte_text(number: float | None) -> str:
    """Returns bytes in a decimal unit, three digits."""
    if number is None:
        return NONE
    size, unit = byte_unit(number)
    value = number / size
    digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def operations(number: float | None) -> str:
    """Returns a number of floating-point operations in a decimal unit, three digits."""
    if number is None or not isfinite(number):
        return NONE
    units = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    size, unit = next(((size, unit) for size, unit in units if number >= size), (1.0, "FLOP"))
    return f"{number / size:.3g} {unit}" if number < 1e21 else f"{number / size:.0f} {unit}"


def duration(seconds: float | None) -> str:
    """Returns a time in seconds, minutes or hours."""
    if seconds is None or not isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def span(numbers: list[int]) -> str:
    """Returns the range of whole numbers, such as ``4–24``."""
    if not numbers:
        return NONE
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def margin95(share: float | None, examples: int | None) -> float | None:
    """Returns half the width of the 95 % Wilson interval of a share measured on so many examples."""
    if share is None or not examples or not 0 <= share <= 1:
        return None
    z2 = _Z95**2
    spread = sqrt(share * (1 - share) / examples + z2 / (4 * examples**2))
    return _Z95 * spread / (1 + z2 / examples)
