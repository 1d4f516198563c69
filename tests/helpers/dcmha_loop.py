"""DCMHA written a second time, as dumb as it gets: float64, plain loops, and a matrix for every pair of query and key.

Nothing of `headlab.dcmha` is used but the names and layouts of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, erf, sin, sqrt

import numpy as np

Array = np.ndarray
LOW_RANK = ("pre_query", "pre_key", "post_query", "post_key")  # the order in which weights lie


@dataclass(frozen=True)
class Maps:
    """The maps of one layer, from its raw weights (`dw1.weight`, `qkw.weight`, `dd.weight`, `base.weight`)."""

    weights: dict[str, Array]
    n_heads: int
    places: frozenset[str]  # pre_base ... post_key_gate
    rank: int
    groups: int = 1
    residual: bool = True
    scale: dict[str, float] | None = None

    def token(self, place: str, x: Array) -> Array:
        """What one token adds to the map by a low-rank branch or a gate, [head, head]."""
        size = self.n_heads // self.groups
        out = np.zeros((self.n_heads, self.n_heads))
        branch = place.removesuffix("_gate")
        there = [name for name in LOW_RANK if (f"{name}_gate" if place.endswith("_gate") else name) in self.places]
        c = there.index(branch)
        if place.endswith("_gate"):
            for head in range(self.n_heads):
                out[head, head] = np.tanh(self.weights["dd.weight"][c * self.n_heads + head] @ x)
            return out
        n_hidden = self.weights["qkw.weight"].shape[2]
        for group in range(self.groups):
            hidden = np.array([
                gelu(self.weights["dw1.weight"][(c * self.groups + group) * n_hidden + k] @ x) for k in range(n_hidden)
            ])  # fmt: skip
            for r in range(self.rank):
                w1 = [hidden @ self.weights["qkw.weight"][c, group, :, r, m] for m in range(size)]
                w2 = [hidden @ self.weights["qkw.weight"][c, group, :, self.rank + r, m] for m in range(size)]
                norm = sqrt(sum(w * w for w in w1) / size + 1e-6)
                for m in range(size):
                    for n in range(size):
                        out[group * size + m, group * size + n] += w1[m] / norm * w2[n]
        return out

    def fixed(self, place: str) -> Array:
        """The base map, [head, head]."""
        size = self.n_heads // self.groups
        out = np.zeros((self.n_heads, self.n_heads))
        c = [name for name in ("pre_base", "post_base") if name in self.places].index(place)
        for group in range(self.groups):
            here = slice(group * size, (group + 1) * size)
            out[here, here] = self.weights["base.weight"][c, group]
        return out

    def branches(self, stage: str, side: str, x: Array) -> dict[str, Array]:
        """By branch, what a token brings to the maps of a stage as a query or as a key (`side`)."""
        names = [name for name in (side, f"{side}_gate") if f"{stage}_{name}" in self.places]
        return {name: self._scaled(f"{stage}_{name}", self.token(f"{stage}_{name}", x)) for name in names}

    def always(self, stage: str) -> dict[str, Array]:
        """The parts that are the same for every pair."""
        parts = {"identity": np.eye(self.n_heads)} if self.residual else {}
        if f"{stage}_base" in self.places:
            parts["base"] = self._scaled(f"{stage}_base", self.fixed(f"{stage}_base"))
        return parts

    def _scaled(self, place: str, part: Array) -> Array:
        return part if self.scale is None else self.scale[place] * part

    def whole(self, stage: str, queries: list[Array], keys: list[Array]) -> list[list[Array]]:
        """C(i, j) of a stage, for every query i and key j."""
        always = sum(self.always(stage).values(), np.zeros((self.n_heads, self.n_heads)))
        by_query = [sum(self.branches(stage, "query", x).values(), always) for x in queries]
        by_key = [sum(self.branches(stage, "key", x).values(), 0 * always) for x in keys]
        return [[ours + theirs for theirs in by_key] for ours in by_query]


def gelu(x: float) -> float:
    return x * (1 + erf(x / sqrt(2))) / 2


@dataclass(frozen=True)
class Transformer:
    """A DCFormer or DCPythia from its weights (named as in its state dict) and its config as a dict; one text, no cache."""

    weights: dict[str, Array]
    config: dict

    def logits(self, ids: list[int]) -> Array:
        """[pos, vocab]"""
        w, config = self.weights, self.config
        stream = [w["model.embed_tokens.weight"][i] for i in ids]
        for layer, window in enumerate(self.windows()):
            path = f"model.layers.{layer}."
            normed = [self.norm(f"{path}input_layernorm", x) for x in stream]
            attended = self.attention(path + "self_attn.", layer, normed, window)
            middle = [x + out for x, out in zip(stream, attended, strict=True)]
            read = stream if config.get("use_parallel_residual") else middle
            stream = [
                x + self.mlp(f"{path}mlp.", self.norm(f"{path}post_attention_layernorm", y))
                for x, y in zip(middle, read, strict=True)
            ]
        return np.array([w["lm_head.weight"] @ self.norm("model.norm", x) for x in stream])

    def windows(self) -> list[int | None]:
        kind, size = self.config["window_type"], self.config["window_size"]
        if kind is None and size is None:
            return [None] * self.config["num_hidden_layers"]
        cycle = {None: 2, "LG": 2, "LGLL": 4, "LGL6": 8}[kind]  # the second layer of a cycle is global
        return [None if i % cycle == 1 else size for i in range(self.config["num_hidden_layers"])]

    def norm(self, path: str, x: Array) -> Array:
        if self.config["model_type"] == "dcformer":
            return x / np.sqrt((x * x).mean() + self.config["norm_eps"]) * self.weights[f"{path}.weight"]
        x = x - x.mean()
        return (
            x / np.sqrt((x * x).mean() + self.config["norm_eps"]) * self.weights[f"{path}.weight"]
            + self.weights[f"{path}.bias"]
        )

    def linear(self, path: str, x: Array) -> Array:
        return self.weights[f"{path}.weight"] @ x + self.weights.get(f"{path}.bias", 0)

    def mlp(self, path: str, x: Array) -> Array:
        up = self.linear(f"{path}up_proj", x)
        if self.config["model_type"] == "dcpythia":
            return self.linear(f"{path}down_proj", np.array([gelu(value) for value in up]))
        gate = self.linear(f"{path}gate_proj", x)
        hidden = gate / (1 + np.exp(-gate)) * up
        if self.config["mgate"]:
            logits = self.linear(f"{path}group_proj", x)
            weights = np.exp(logits) / np.exp(logits).sum()
            size = len(hidden) // len(weights)
            hidden = np.array([value * weights[i // size] for i, value in enumerate(hidden)])
        return self.linear(f"{path}down_proj", hidden)

    def heads(self, path: str, name: str, x: Array, pos: int) -> list[Array]:
        """Queries, keys or values of one token, head by head."""
        d_head = self.config["head_dim"]
        flat = self.linear(f"{path}{name}_proj", x)
        out = []
        for head in range(len(flat) // d_head):
            part = flat[head * d_head : (head + 1) * d_head].copy()
            if name != "v":
                if self.config["use_qk_norm"]:
                    part = part / np.sqrt((part * part).mean() + 1e-6) * self.weights[f"{path}{name}_norm.weight"]
                n = int(d_head * self.config["rotary_pct"])
                for f in range(n // 2):
                    angle = pos * self.config["rope_theta"] ** (-2 * f / n)
                    a, b = part[f], part[f + n // 2]
                    part[f], part[f + n // 2] = a * cos(angle) - b * sin(angle), b * cos(angle) + a * sin(angle)
            out.append(part)
        return out

    def maps(self, path: str) -> Maps:
        prefix, options = f"{path}compose.", self.config["compose"] or {"branches": [], "rank": 1}
        stages = options.get("stages", ["pre", "post"])
        branches = options["branches"]
        places = [b for b in branches if b.startswith("p") and b.split("_")[0] in stages]
        places += [f"{stage}_{branch}" for branch in branches if not branch.startswith("p") for stage in stages]
        return Maps(
            {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)},
            self.config["num_attention_heads"],
            frozenset(places),
            options.get("rank", 2),
            options.get("groups", 1),
            options.get("residual", True),
        )

    def attention(self, path: str, layer: int, x: list[Array], window: int | None) -> list[Array]:
        n_heads, n_pos = self.config["num_attention_heads"], len(x)
        shared = n_heads // self.config["num_key_value_heads"]
        q, k, v = ([self.heads(path, name, x[t], t) for t in range(n_pos)] for name in "qkv")
        maps = self.maps(path)
        pre, post = maps.whole("pre", x, x), maps.whole("post", x, x)
        out = []
        for i in range(n_pos):
            seen = [j for j in range(i + 1) if window is None or i - j < window]
            scores = np.zeros((len(seen), n_heads))
            for row, j in enumerate(seen):
                raw = [q[i][h] @ k[j][h // shared] / sqrt(self.config["head_dim"]) for h in range(n_heads)]
                scores[row] = np.array(raw) @ pre[i][j]
            exp = np.exp(scores - scores.max(0))
            pattern = exp / exp.sum(0)
            z = np.zeros((n_heads, self.config["head_dim"]))
            for row, j in enumerate(seen):
                composed = pattern[row] @ post[i][j]
                for h in range(n_heads):
                    z[h] += composed[h] * v[j][h // shared]
            out.append(self.linear(f"{path}o_proj", z.reshape(-1)))
        return out
