"""The branches of composition maps at each stage, the sites where heads can be removed, and what sizes maps can have."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import HeadlabError

STAGES = ("pre", "post")
BRANCHES = ("base", "query", "query_gate", "key", "key_gate")
DYNAMIC = BRANCHES[1:]
PLACES = tuple(f"{stage}_{branch}" for stage in STAGES for branch in BRANCHES)  # pre_base ... post_key_gate
SITES = ("output", "head", "scores", "probabilities", *PLACES)
"""Where a head can be removed: its output; the head wholly; its scores (they leave every composed head); its
probabilities (likewise); or what one branch at one stage adds to the composed head."""
SCORE_TAPS = ("scores_raw", "scores", "pattern_raw", "pattern")


def places_of(branches: Sequence[str], stages: Sequence[str] = STAGES) -> tuple[str, ...]:
    """Branches, for both stages or by stage, as places in their order: `("query",)` -> `("pre_query", "post_query")`."""
    branches, stages = list(branches), list(stages)
    if unknown := [b for b in branches if b not in (*BRANCHES, *PLACES)] + [s for s in stages if s not in STAGES]:
        raise HeadlabError(
            f"no branch or stage is called {', '.join(map(repr, unknown))}: branches are {', '.join(BRANCHES)} (also with "
            f"their stage: {PLACES[0]}), stages are {' and '.join(STAGES)}"
        )
    wanted = {f"{stage}_{branch}" for branch in branches if branch in BRANCHES for stage in stages}
    wanted |= {branch for branch in branches if branch in PLACES and branch.split("_")[0] in stages}
    return tuple(place for place in PLACES if place in wanted)


def heads_per_group(n_heads: int, groups: int) -> int:
    if groups < 1 or n_heads % groups:
        raise HeadlabError(f"{n_heads} heads cannot be composed in {groups} groups: groups must divide the number of heads")
    return n_heads // groups


def check_rank(rank: int, per_group: int, places: Sequence[str]) -> int:
    if any(place.endswith(("_query", "_key")) for place in places) and not 1 <= rank <= per_group:
        raise HeadlabError(f"the rank is from 1 to the number of heads in a group ({per_group}), not {rank}")
    return rank
