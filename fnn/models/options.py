"""The check of what the models' functions have in common."""

from __future__ import annotations

from fnn import arguments


def check_options(where: str, *, dropout: float | None = None, **counts: int) -> None:
    """Raise unless all counts are integers of at least 1, heads divide features, dropout is a rate.

    The parts check their options too, but would call them by other names.
    """
    for name, value in counts.items():
        arguments.integer(where, name, value, least=1)
    if "heads" in counts and counts["features"] % counts["heads"]:
        raise ValueError(
            f"{where}: heads must divide features, {counts['features']}, but got {counts['heads']}."
        )
    if dropout is not None:
        arguments.number(where, "dropout", dropout, least=0, most=1)
