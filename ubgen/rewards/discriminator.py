"""The discriminator of Eq. 5: is this CLIP feature of a generated image or of a class name?"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Discriminator(nn.Module):
    """Linear - activation - Linear on CLIP features. The logit is positive for images, negative for texts.

    `dim` is the feature width, `hidden` the width between (3 when None, as in the authors' released code; the
    paper gives none). `activation` "relu" is the paper's, "leaky_relu" with `slope` 0.2 the released one.
    `features` "raw" takes CLIP's features as they come, "normalised" divides each by its L2 norm first.

    Computes in float32 whatever the features' precision, also under autocast.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        activation: Literal["relu", "leaky_relu"] = "relu",
        slope: float = 0.2,
        features: Literal["raw", "normalised"] = "raw",
    ) -> None:
        super().__init__()
        if activation not in ("relu", "leaky_relu"):
            raise ValueError(f"activation must be 'relu' or 'leaky_relu', not {activation!r}")
        if features not in ("raw", "normalised"):
            raise ValueError(f"features must be 'raw' or 'normalised', not {features!r}")
        hidden = 3 if hidden is None else hidden
        between = nn.ReLU() if activation == "relu" else nn.LeakyReLU(slope)
        # the parameters have the released code's names: head.cls.0 and head.cls.2
        cls = nn.Sequential(nn.Linear(dim, hidden), between, nn.Linear(hidden, 1))
        self.head = nn.ModuleDict({"cls": cls})
        self.normalised = features == "normalised"

    def forward(self, features_BD: Tensor) -> Tensor:
        """CLIP features (B, dim) -> logits (B, 1): sigmoid(logit) is the probability of "image"."""
        with torch.autocast(features_BD.device.type, enabled=False):
            x = features_BD.to(next(self.parameters()).dtype)
            return self.head["cls"](F.normalize(x, dim=-1) if self.normalised else x)
