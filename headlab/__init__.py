"""headlab: the attention heads of transformers, one by one.

What each head does, which heads matter, and models that really are smaller without the rest. Names load when they are
first used: `import headlab` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import plots
    from .attention.prompts import attention_patterns
    from .attention.roles import patterns, roles
    from .attention.similarity import similarity
    from .attribution.ablation import AblationScores, ablation
    from .attribution.gradients import importance
    from .circuits.composition import composition_scores, map_composition
    from .circuits.matrices import composed_circuit, ov, qk
    from .circuits.summary import circuit_table
    from .circuits.tokens import directions, score_parts, top_pairs
    from .data.losses import own_loss
    from .data.texts import read_batches, text_batches
    from .dcmha.maps import CompositionMaps, composition_maps
    from .errors import HeadlabError
    from .hooks.capture import capture
    from .hooks.fills import Fill, fill
    from .hooks.masking import masked
    from .loading import bridge, load
    from .models.access import heads
    from .models.families import Family, register
    from .pruning.curves import Curve, pruning_curve
    from .pruning.surgery import deviation, kept, prune, save_pruned
    from .pruning.timing import Timing, timing
    from .report_page.build import report
    from .results import Result
    from .scores import HeadMask, HeadScores
    from .studies.checkpoints import profile
    from .studies.correlation import correlate
    from .studies.stacks import stack_curves
    from .tables import Head

_HOME = {  # no module may have the name of something public: importing it would hide the other
    "attention.prompts": ("attention_patterns",),
    "attention.roles": ("patterns", "roles"),
    "attention.similarity": ("similarity",),
    "attribution.ablation": ("AblationScores", "ablation"),
    "attribution.gradients": ("importance",),
    "circuits.composition": ("composition_scores", "map_composition"),
    "circuits.matrices": ("composed_circuit", "ov", "qk"),
    "circuits.summary": ("circuit_table",),
    "circuits.tokens": ("directions", "score_parts", "top_pairs"),
    "data.losses": ("own_loss",),
    "data.texts": ("read_batches", "text_batches"),
    "dcmha.maps": ("CompositionMaps", "composition_maps"),
    "errors": ("HeadlabError",),
    "hooks.capture": ("capture",),
    "hooks.fills": ("Fill", "fill"),
    "hooks.masking": ("masked",),
    "loading": ("bridge", "load"),
    "models.access": ("heads",),
    "models.families": ("Family", "register"),
    "pruning.curves": ("Curve", "pruning_curve"),
    "pruning.surgery": ("deviation", "kept", "prune", "save_pruned"),
    "pruning.timing": ("Timing", "timing"),
    "report_page.build": ("report",),
    "results": ("Result",),
    "scores": ("HeadMask", "HeadScores"),
    "tables": ("Head",),
    "studies.checkpoints": ("profile",),
    "studies.correlation": ("correlate",),
    "studies.stacks": ("stack_curves",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AblationScores", "CompositionMaps", "Curve", "Family", "Fill", "Head", "HeadMask", "HeadScores", "HeadlabError",
    "Result", "Timing", "ablation", "attention_patterns", "bridge", "capture", "circuit_table", "composed_circuit",
    "composition_maps", "composition_scores", "correlate", "deviation", "directions", "fill", "heads", "importance", "kept",
    "load", "map_composition", "masked", "ov", "own_loss", "patterns", "plots", "profile", "prune",
    "pruning_curve", "qk", "read_batches", "register", "report", "roles", "save_pruned", "score_parts", "similarity",
    "stack_curves", "text_batches", "timing", "top_pairs",
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
