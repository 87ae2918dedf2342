"""Values of a generator's parameters on the command line."""

from __future__ import annotations

from collections.abc import Sequence


def varied_parameters(texts: Sequence[str]) -> dict[str, list[float]]:
    """Reads "name=1,2,3" texts.

    Raises:
        UserError: if one is of another form, or two name one parameter.
    """
    from genssl.errors import UserError

    found: dict[str, list[float]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if not equals or not name.strip() or not numbers:
            raise UserError(f"--vary {text}: a parameter and its values are expected, such as noise_level=0,200,400")
        if name.strip() in found:
            raise UserError(f"--vary {text}: {name.strip()} is given twice; give all its values at once")
        found[name.strip()] = numbers
    return found
