"""A trained body with a head over classes in place of its head over tokens.

B sequences, L positions, N examples, D hidden, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.base import LanguageModel
from engine.models.dropout import dropout, seeds_in_use

DROPOUT = 0.1  # before the last layer
SITE = 2**20  # of that dropout, beyond the sites of any body


class Classifier(LanguageModel):
    """A classifier whose forward pass stops before the last layer: its `head` is [C, D] and its `head_bias` [C].

    The layers of the head are those of BabyLM 2025's own code.
    """

    def __init__(self, body: LanguageModel, classes: int, seed: int) -> None:
        """Takes over `body` and removes its own head; `seed` draws the new one."""
        super().__init__(body.shape)
        width = body.shape.hidden
        del body.lm_head
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.dense, self.out = nn.Linear(width, width), nn.Linear(width, classes)
        self.body = body

    @property
    def embedding(self) -> nn.Embedding:
        return self.body.embedding

    @property
    def head(self) -> Tensor:
        return self.out.weight

    @property
    def head_bias(self) -> Tensor:
        return self.out.bias

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, dropout_seeds_B: Tensor | None = None) -> Tensor:
        """Returns the hidden states [N, D] of the examples, one per sequence; each is read off its place in rows_N."""
        dropout_seeds_B = seeds_in_use(dropout_seeds_B, DROPOUT, training=self.training)
        x_ND = self.body.states(tokens_BL, rows_N, dropout_seeds_B)
        x_ND = F.gelu(self.dense(F.layer_norm(x_ND, x_ND.shape[-1:])))
        return dropout(F.layer_norm(x_ND, x_ND.shape[-1:]), DROPOUT, dropout_seeds_B, SITE)
