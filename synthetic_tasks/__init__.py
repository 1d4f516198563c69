"""Tasks that cross where heads look with what they carry, and what solves them.

`CrossComposition` is the trainable task over records, `InContextTasks` the same questions in sentences for pretrained
models, `published_tasks` reads the task file of DCFormer, and `evaluate` scores a language model on any sentences.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.scoring import Evaluation, evaluate
    from .language.contexts import Answer, Context
    from .language.in_context import InContextTasks
    from .language.published import published_tasks
    from .symbolic import CrossComposition

_HOME = {
    "Answer": "language.contexts",
    "Context": "language.contexts",
    "CrossComposition": "symbolic",
    "Evaluation": "evaluation.scoring",
    "InContextTasks": "language.in_context",
    "evaluate": "evaluation.scoring",
    "published_tasks": "language.published",
}

__all__ = ["Answer", "Context", "CrossComposition", "Evaluation", "InContextTasks", "evaluate", "published_tasks"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'synthetic_tasks' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
