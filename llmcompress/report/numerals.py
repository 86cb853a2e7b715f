"""How a number of the report is printed: short, and never so short that a difference disappears.

Two values of a row that differ print differently, and what is not zero does not print as zero: an interval that ends
at -0.02004 beside a budget of 0.02 must not look as if it touched it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

MOST_PLACES = 12
_NOTHING = 10.0**-MOST_PLACES


def places(values: Iterable[float], least: int = 4) -> int:
    """Decimals, at least `least`, at which different values print differently and small ones keep two digits.

    >>> places([-0.01, 0.02]), places([-0.02004, -0.02]), places([0.000012])
    (4, 5, 6)
    """
    found = sorted(value for value in values if math.isfinite(value))
    small = [abs(value) for value in found if abs(value) > _NOTHING]
    start = max([least, *(1 - math.floor(math.log10(value)) for value in small)])
    for digits in range(start, MOST_PLACES):
        if all(fixed(a, digits) != fixed(b, digits) or _same(a, b) for a, b in pairwise(found)):
            return digits
    return MOST_PLACES


def _same(a: float, b: float) -> bool:
    """Equal but for the last bits of floating point."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=_NOTHING)


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """`value` with so many decimals; zero has no sign.

    >>> fixed(-0.00001, 4), fixed(0.5, 2, sign=True)
    ('0.0000', '+0.50')
    """
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}"


def percent(frac: float) -> str:
    """A share in percent; only all of it is 100 %, and only none of it is 0 %.

    >>> percent(0.98765), percent(0.999996), percent(1.0)
    ('98.77 %', '99.9996 %', '100 %')
    """
    if frac in (0.0, 1.0):
        return f"{frac:.0%}".replace("%", " %")
    return f"{fixed(100 * frac, places([0.0, 100 * frac, 100.0], least=2))} %"


def p_value(p: float) -> str:
    """A probability; what is too small to print is said to be small.

    >>> p_value(0.03125), p_value(0.00001), p_value(1.0)
    ('0.0312', '< 0.0001', '1')
    """
    if p < 0.0001:
        return "< 0.0001"
    return "1" if p == 1 else f"{p:.4f}"


def significant(value: float, digits: int = 4) -> str:
    """`value` to so many significant digits.

    >>> significant(9.308548), significant(0.0000123456, 3), significant(32.0), significant(12345.6)
    ('9.309', '1.23e-05', '32', '12346')
    """
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def size(num_bytes: int) -> str:
    """Bytes to three digits in the decimal unit that one can think in.

    >>> size(6714368), size(512), size(999_999), size(14_483_464_192)
    ('6.71 MB', '512 bytes', '1.00 MB', '14.5 GB')
    """
    if num_bytes < 1000:
        return f"{num_bytes} bytes"
    value, unit = num_bytes / 1000, 0
    while value >= 999.5 and unit < 3:
        value, unit = value / 1000, unit + 1
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {'kMGT'[unit]}B"
