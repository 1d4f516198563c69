"""Results drawn as plotly figures. A function takes a result and returns a `go.Figure`; it never shows it, sets no
renderer or template, and needs no network."""

from .answers import tasks
from .common import save_html
from .composition import maps
from .crossing import PROBES, feature_map, probe_kinds, probes
from .pruning import against, curves, heads, timing

__all__ = [
    "PROBES", "against", "curves", "feature_map", "heads", "maps", "probe_kinds", "probes", "save_html", "tasks", "timing",
]  # fmt: skip
