"""What a healing run may be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lillama_core.recipe.model import DATA_FIELDS as OF_DATA
from lillama_core.strategies import StrategyOptions

TOKENS = 131072
"""Of data by default: four times what the recipe `default` calibrates on."""
EPOCHS = 2.0
"""By default, how often the training goes through the data."""
DATA_FIELDS = (*OF_DATA, "held_out")
"""Fields of a recipe that say on which data a model is trained, and in what arithmetic, besides its sources."""


class HealingOptions(StrategyOptions):
    """How a compressed model is trained as a whole."""

    objective: Literal["kd", "lm", "kd+lm"] = Field(
        default="kd",
        description="what is minimised: kd, the divergence of the predictions from the dense model's; lm, the loss of"
        " the data's own tokens; kd+lm, the mean of both",
    )
    # SmolLM2 at 20 % by `default`, 56 steps on 65,536 tokens, one run each: the divergence on rows that are not trained
    # on fell by 8.5 % with all, and by 5.8 % with factors at a revision before.
    train: Literal["all", "factors", "norms"] = Field(
        default="all",
        description="what is trained: all parameters, the embedding included; factors, the low-rank maps and what lost"
        " channels, in less memory; norms, the vectors outside of them, norms and biases",
    )
    learning_rate: float = Field(
        default=1e-5,
        description="peak learning rate; in seven steps of SmolLM2 at 20 % by `fast` 1e-4 raised the divergence on rows"
        " that are not trained on by 31 %, and 1e-5 lowered it by 8 %",
        gt=0.0,
        le=1.0,
    )
    warmup: float = Field(default=0.1, description="part of the steps in which the learning rate rises", ge=0.0, le=1.0)
    gradient_clip: float = Field(default=1.0, description="largest norm of the gradient; 0: no limit", ge=0.0)
    weight_decay: float = Field(default=0.0, description="AdamW's weight decay", ge=0.0, le=1.0)
    evaluations: int = Field(
        default=8,
        description="how often, evenly spread, rows that are not trained on say how well it goes",
        ge=1,
        le=1000,
    )
    patience: int = Field(
        default=3, description="after so many evaluations in a row that found nothing better the training stops", ge=1
    )
