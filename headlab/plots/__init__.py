"""Results drawn as plotly figures. A function takes a result and returns a `go.Figure`; it never shows it, sets no
renderer or template, and needs no network."""

from ..errors import HeadlabError

try:
    import plotly  # noqa: F401
except ImportError as error:
    raise HeadlabError("figures are drawn by plotly, which is not installed: pip install plotly") from error

from .attention import roles, similarity, similarity_matrix
from .circuits import content, spectra, tokens_of
from .common import save_html, shown
from .composition import composition_graph, composition_matrix
from .dcmha import map_branches, map_grid, maps
from .evaluation import tasks
from .probing import PROBES, feature_map, probe_kinds, probes
from .prompts import pattern
from .pruning import against, curves, heads, timing
from .studies import correlation, profile

__all__ = [
    "PROBES", "against", "composition_graph", "composition_matrix", "content", "correlation", "curves", "feature_map",
    "heads", "map_branches", "map_grid", "maps", "pattern", "probe_kinds", "probes", "profile", "roles", "save_html",
    "shown", "similarity", "similarity_matrix", "spectra", "tasks", "timing", "tokens_of",
]  # fmt: skip
