"""Models and losses that compute in float64 throughout, where transformers and `own_loss` go through float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.helpers import zoo


def build64(name: str) -> nn.Module:
    """A model of the zoo in float64, its RMS norms too."""
    model = zoo.build(name).double()
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
            module.forward = _rms_norm.__get__(module)  # these round to float32, whatever they are given
    return model


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def loss64(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What `own_loss` gives, not rounded to float32; token by token."""
    labels = batch.get("labels", batch["input_ids"])
    logits = model(**{name: value for name, value in batch.items() if name != "labels" or labels.ndim == 2}).logits
    if labels.ndim == 1:
        return torch.stack([cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)])
    causal = "labels" not in batch
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    means = []
    for i in range(len(labels)):
        targets = [(t, int(labels[i, t])) for t in range(causal, labels.shape[1]) if labels[i, t] != -100]
        if causal:
            targets = [(t - 1, label) for t, label in targets if mask[i, t - 1] and mask[i, t]]
        means.append(-torch.stack([logits[i, t].log_softmax(-1)[label] for t, label in targets]).mean())
    return torch.stack(means)
