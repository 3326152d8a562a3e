"""Units at the borders: nanoseconds inside, milliseconds and readable counts outside."""

from __future__ import annotations

NS_PER_MS = 1_000_000


def ms(nanoseconds: float) -> float:
    """Convert nanoseconds to milliseconds."""
    return nanoseconds / NS_PER_MS


def readable(count: float, unit: str = "") -> str:
    """Write a count with a decimal prefix.

    >>> readable(11_689_512)
    '11.69M'
    >>> readable(512)
    '512'
    >>> readable(44_600_000, 'B')
    '44.60MB'
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.2f}{prefix}{unit}"
    return f"{count:g}{unit}"
