"""The words that users choose between, each written once, for the library and for the command line."""

from __future__ import annotations

from typing import Any, Literal, get_args

from .errors import HeadlabError

Unit = Literal["head", "group"]
"""What is removed together: a head, or all heads that read one key-value head."""
Norm = Literal["raw", "fold"]
"""Weights as they are, or with the gains of the norms on the way."""
Circuit = Literal["qk", "ov"]
Method = Literal["taylor", "magnitude", "random"]
"""How `importance` scores heads."""
Reduction = Literal["token", "example", "batch", "signed"]
"""Where the absolute value stands in a gradient score."""
Denominator = Literal["examples", "tokens", "published"]
Normalize = Literal["layer", "minmax"]
Policy = Literal["pad", "ungroup", "strict"]
"""What surgery does where groups keep unequal numbers of query heads."""


def check(name: str, given: object, choices: Any) -> None:
    """Raise `HeadlabError` unless an argument is one of these words.

    >>> check("unit", "layer", Unit)
    Traceback (most recent call last):
        ...
    headlab.errors.HeadlabError: unit is 'head' or 'group', not 'layer'
    """
    words = get_args(choices)
    if given not in words:
        *others, last = map(repr, words)
        raise HeadlabError(f"{name} is {', '.join(others)} or {last}, not {given!r}")
