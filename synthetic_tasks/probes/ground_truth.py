"""The maps of a trained probe against what the task asks of them: at a query (p, a), from the QK of p to the OV of a.

Which head looks a feature up, and which one carries it, is measured on the trained probe; the map at a query then says
how strongly looking up any feature is tied to reporting any other one there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headlab.dcmha import STAGES
from headlab.dcmha.compose import Compose, Side
from headlab.errors import HeadlabError

from ..symbolic import CrossComposition, Sample, Split
from .models import ProbeAttention, ProbeBlock, ProbeForSequenceClassification


class LooksAndCarries(NamedTuple):
    """What the heads of a probe do.

    Attributes:
        looks_up: by how much the (raw, scaled) score of a head is higher at the record that the query names by a feature
            than at the others.
        carries: by how much the output of a head, at a record, raises the logit of the record's value of a feature above
            the mean of the values that it might have.
    """

    looks_up: Float[Tensor, "head feature"]
    carries: Float[Tensor, "head feature"]


@dataclass(frozen=True, eq=False)
class Truth:
    """Maps of a probe, read at queries, between features: [query, feature looked up, feature reported].

    Attributes:
        task, sample: the queries.
        maps: how much of feature a of the record named by p would come through the map of this query:

                composed[n] = sum over m of looks_up[m, p] * C_pre[m, n]
                maps[p, a] = sum over n, k of attention(composed[n]) * C_post[n, k] * carries[k, a]

            where attention(d) is what a softmax pays one record whose score stands out by d, above an equal share. The
            maps C are those of the query, averaged over the records.
        heads: what each one does.
    """

    task: CrossComposition
    sample: Sample
    maps: Float[Tensor, "n feature feature"]
    heads: LooksAndCarries

    @property
    def strongest(self) -> Int[Tensor, "n 2"]:
        """For every query, the features (p, a) of those it names a record by, and of all, that the map ties most."""
        features = self.task.n_features
        device = self.maps.device
        maps = self.maps.masked_fill(torch.eye(features, dtype=torch.bool, device=device), -torch.inf)
        if self.task.level == "binding":  # which names a record by p only
            unnamed = torch.arange(features, device=device) != self.sample.looked_up[:, None]
            maps = maps.masked_fill(unnamed[..., None], -torch.inf)
        best = maps.flatten(1).argmax(1)
        return torch.stack([best // features, best % features], 1)

    @property
    def share(self) -> float:
        """Share of queries at which that is the true pair."""
        asked = torch.stack([self.sample.looked_up, self.sample.reported], 1)
        return (self.strongest == asked).all(1).double().mean().item()

    @property
    def chance(self) -> float:
        """What guessing would give."""
        others = self.task.n_features - 1
        return 1 / (others if self.task.level == "binding" else others * self.task.n_features)

    def mean(self, looked_up: int, reported: int) -> Float[Tensor, "feature feature"]:
        """The mean map of the queries for a pair.

        Raises:
            HeadlabError: no query of the sample asks for it.
        """
        asked = (self.sample.looked_up == looked_up) & (self.sample.reported == reported)
        if not asked.any():
            raise HeadlabError(f"no query looks {looked_up} up and reports {reported}: take another split, or more queries")
        return self.maps[asked].mean(0)


@torch.no_grad()
def compare(probe: ProbeForSequenceClassification, task: CrossComposition, split: Split = "seen", n: int = 512) -> Truth:
    """Read the maps of a probe of one layer at n queries of a split.

    Raises:
        HeadlabError: the probe has several layers, or attention that is not composed by maps; too few queries.
    """
    attention = _attention(probe)
    heads = measured_heads(probe, task, n)
    sample = task.sample(n, split, probe.device, draw=1)
    pre, post = mean_maps(attention.compose, _input(probe, sample.ids))
    composed = torch.einsum("mp,bmn->bnp", heads.looks_up, pre)
    others = composed.new_tensor(task.n_records - 1)
    attended = (composed - others.log()).sigmoid() - 1 / task.n_records  # exp(d) / (exp(d) + others), for any d
    return Truth(task, sample, torch.einsum("bnp,bnk,ka->bpa", attended, post, heads.carries), heads)


@torch.no_grad()
def measured_heads(probe: ProbeForSequenceClassification, task: CrossComposition, n: int = 512) -> LooksAndCarries:
    """What the heads of a probe look up and carry, over n queries of trained combinations.

    Raises:
        HeadlabError: as `compare`, or so few queries that none of them looks some feature up.
    """
    attention = _attention(probe)
    sample = task.sample(n, "seen", probe.device, draw=2)
    x = _input(probe, sample.ids)
    d_head, records = attention.head_dim, task.n_records
    q, k, v = (part(x).unflatten(-1, (-1, d_head)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = torch.einsum("bhd,brhd->bhr", q[:, -1], k[:, :records]) * d_head**-0.5
    looks_up = []
    for feature in range(task.n_features):
        named, valid = _named(task, sample, feature)
        if not valid.any():
            raise HeadlabError(f"none of {n} queries looks feature {feature} up: take more of them")
        at = scores[valid].gather(-1, named[valid][:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
        looks_up.append((at * records - scores[valid].sum(-1)).mean(0) / max(1, records - 1))
    out = attention.o_proj.weight.unflatten(1, (-1, d_head))  # [d_model, head, d_head]
    written = torch.einsum("brhd,mhd->brhm", v[:, :records], out)
    written = (written - written.mean(-1, keepdim=True)) * probe.norm.weight
    logits = written @ probe.head.weight.T  # [n, record, head, class]
    if not task.shared_values:
        logits = logits.unflatten(-1, (task.n_features, task.n_values))
    else:
        logits = logits[..., None, :].expand(*logits.shape[:-1], task.n_features, task.n_values)
    logits = logits - logits.mean(-1, keepdim=True)
    own = sample.values[:, :, None, :, None].expand(*logits.shape[:4], 1)
    carries = logits.gather(-1, own)[..., 0].mean((0, 1))
    return LooksAndCarries(torch.stack(looks_up, 1), carries)


def _attention(probe: ProbeForSequenceClassification) -> ProbeAttention:
    attention = probe.layers[0].self_attn
    if len(probe.layers) != 1 or not isinstance(attention, ProbeAttention):
        raise HeadlabError(
            f"the maps of one layer of composed heads can be read, not those of {len(probe.layers)} layers of "
            f"{probe.config.kind} attention"
        )
    return attention


def _input(probe: ProbeForSequenceClassification, ids: Tensor) -> Float[Tensor, "n pos d_model"]:
    """What q, k, v and the maps are made of."""
    block = probe.layers[0]
    assert isinstance(block, ProbeBlock)
    return block.norm(probe.stream(ids))


def _named(task: CrossComposition, sample: Sample, feature: int) -> tuple[Tensor, Tensor]:
    """The record that each query names by a feature, and whether it names one."""
    if task.level == "binding":
        return sample.record, sample.looked_up == feature
    token = sample.ids[:, -1, feature] - task.n_features * task.n_values - feature * task.n_values
    return (sample.values[..., feature] == token[:, None]).int().argmax(1), torch.ones_like(token, dtype=torch.bool)


def mean_maps(compose: Compose, x: Float[Tensor, "n pos d_model"]) -> tuple[Tensor, Tensor]:
    """The maps before and after the softmax, [n, head from, head to], of the last position; mean over the others as keys."""
    sides = compose(x)
    n_records = x.shape[1] - 1
    found = []
    for stage in STAGES:
        query, key = sides[f"{stage}_query"].at(slice(-1, None)), sides[f"{stage}_key"].at(slice(n_records))
        asking = (None if w is None else w.expand(-1, n_records, *w.shape[2:]) for w in (query.w1, query.w2, query.gate))
        maps = compose.dense(stage, Side(*asking), key)
        found.append(maps.mean(1) if maps.ndim == 4 else maps.to(x.device).expand(len(x), *maps.shape))
    return found[0], found[1]
