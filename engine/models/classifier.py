"""A trained body with a head over classes in place of its head over tokens.

B sequences, L positions, N examples, D hidden, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.dropout import dropped
from engine.models.gpt2 import GPT2
from engine.models.inputs import draws_in_use
from engine.models.llama import Llama
from engine.models.roberta import Roberta

DROPOUT = 0.1  # before the last layer
SITE = 2**20  # beyond those of any body


class Classifier(nn.Module):
    """As a language model's, its forward pass stops before the last layer: logits are hidden · `head`ᵀ + `head_bias`,
    [C, D] and [C]. The head is that of BabyLM 2025's own code."""

    def __init__(self, body: Llama | GPT2 | Roberta, classes: int, seed: int) -> None:
        """Takes `body`, whose own head goes; `seed` draws the new one."""
        super().__init__()
        self.shape, width = body.shape, body.shape.hidden
        del body.lm_head
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.dense, self.out = nn.Linear(width, width), nn.Linear(width, classes)
        self.body = body

    @property
    def head(self) -> Tensor:
        return self.out.weight

    @property
    def head_bias(self) -> Tensor:
        return self.out.bias

    def forward(self, tokens_BL: Tensor, rows_N: Tensor | None = None, draws_B: Tensor | None = None) -> Tensor:
        """[N, D] of the examples, from the states of their `rows_N` of the flattened batch, a row of a sequence each.

        draws_B: [B] int64, what each example's dropout is drawn from (engine.models.dropout); only in training.
        """
        draws_B = draws_in_use(draws_B, DROPOUT, training=self.training)
        states = self.body.states if isinstance(self.body, Roberta) else self.body
        x_ND = states(tokens_BL, rows_N) if isinstance(self.body, Llama) else states(tokens_BL, rows_N, draws_B)
        x_ND = F.gelu(self.dense(F.layer_norm(x_ND, x_ND.shape[-1:])))
        return dropped(F.layer_norm(x_ND, x_ND.shape[-1:]), DROPOUT, draws_B, SITE)
