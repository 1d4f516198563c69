"""The type checker that pytest gives to jaxtyping: the shapes in signatures are checked, other annotations are not.

Bad input has to reach headlab's own errors, as it does for users, and not end at a checker in front of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    shapes = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    function.__annotations__ = shapes
    return beartype(function) if shapes else function


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
