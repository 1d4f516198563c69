"""headlab: the attention heads of transformers, one by one.

What each head does, which heads matter, and models that really are smaller without the rest. Names load when they are
first used: `import headlab` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import plots
    from .batches import own_loss
    from .curves import Curve, pruning_curve
    from .dcmha.maps import CompositionMaps, composition_maps
    from .errors import HeadlabError
    from .exact import AblationScores, ablation
    from .families import Family, register
    from .gates import Fill, capture, fill, masked
    from .models import bridge, heads, load
    from .results import Result
    from .scores import Head, HeadMask, HeadScores
    from .speed import Timing, timing
    from .surgery import kept, prune, save_pruned
    from .taylor import importance
    from .texts import read_batches, text_batches

_HOME = {  # no module may have the name of something public: importing it would hide the other
    "batches": ("own_loss",),
    "curves": ("Curve", "pruning_curve"),
    "dcmha.maps": ("CompositionMaps", "composition_maps"),
    "errors": ("HeadlabError",),
    "exact": ("AblationScores", "ablation"),
    "families": ("Family", "register"),
    "gates": ("Fill", "capture", "fill", "masked"),
    "models": ("bridge", "heads", "load"),
    "results": ("Result",),
    "scores": ("Head", "HeadMask", "HeadScores"),
    "speed": ("Timing", "timing"),
    "surgery": ("kept", "prune", "save_pruned"),
    "taylor": ("importance",),
    "texts": ("read_batches", "text_batches"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AblationScores", "CompositionMaps", "Curve", "Family", "Fill", "Head", "HeadMask", "HeadScores", "HeadlabError",
    "Result", "Timing", "ablation", "bridge", "capture", "composition_maps", "fill", "heads", "importance", "kept",
    "load", "masked", "own_loss", "plots", "prune", "pruning_curve", "read_batches", "register", "save_pruned",
    "text_batches", "timing",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "plots" or name in _HOME:
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'headlab' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
