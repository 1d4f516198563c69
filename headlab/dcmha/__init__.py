"""Dynamically composable multi-head attention (DCMHA): DCFormer and DCPythia, and composable heads for other models.

Importing this package tells transformers' Auto classes of all of them.
"""

from .attachment import attach, detach
from .branches import BRANCHES, PLACES, SITES, STAGES
from .compose import Compose, scaled
from .configuration import DCFormerConfig, DCPythiaConfig
from .modeling import DCFormerForCausalLM, DCFormerModel, DCPythiaForCausalLM, DCPythiaModel

__all__ = [
    "BRANCHES", "PLACES", "SITES", "STAGES", "Compose", "DCFormerConfig", "DCFormerForCausalLM", "DCFormerModel",
    "DCPythiaConfig", "DCPythiaForCausalLM", "DCPythiaModel", "attach", "detach", "scaled",
]  # fmt: skip
