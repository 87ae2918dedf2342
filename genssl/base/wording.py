"""Counts as people write them."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: "1 shard", "0 shards", "1,437 images", "0.5 variants".

    Args:
        number: of the things; four digits of one that is not whole.
        noun: for one of them.
        plural: for any other number; by default the noun with an s.
    """
    digits = f"{number:,.0f}" if number == round(number) or number >= 1000 else f"{number:.4g}"
    return f"{digits} {noun if number == 1 else plural or f'{noun}s'}"
