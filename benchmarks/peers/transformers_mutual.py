"""Deep mutual learning (Zhang et al. 2018) as a user of `transformers` writes it: logits of every student, losses in
torch, one AdamW a student. Under `compiled`, models and loss go through `torch.compile`, the rest stays.

B sequences, L positions, N = B·L tokens, V vocabulary, S students.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.eager import ensemble_losses
from engine.config import OptimizerConfig, StudentConfig
from engine.models.llama import LlamaShape


class Loop:
    """S students and their optimizers, in fp32."""

    def __init__(
        self,
        students: Sequence[StudentConfig],
        weights: Sequence[Mapping[str, Tensor]],
        vocabulary: int,
        optimizer: OptimizerConfig,
        device: torch.device,
        *,
        compiled: bool = False,
        fused: bool | None = None,
    ) -> None:
        """`weights` by Hugging Face's names. `fused` as in `torch.optim.AdamW`, whose default on a CPU is a loop over
        parameters.
        """
        self.clip = optimizer.clip
        with device:
            self.models = [_model(c, w, vocabulary) for c, w in zip(students, weights, strict=True)]
        self.optimizers = []
        for config, model in zip(students, self.models, strict=True):
            groups = [
                {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ]
            self.optimizers.append(
                torch.optim.AdamW(
                    groups, lr=config.learning_rate, betas=optimizer.betas, eps=optimizer.eps, fused=fused
                )
            )
        self.forwards = [torch.compile(model) if compiled else model for model in self.models]
        self.losses = torch.compile(ensemble_losses) if compiled else ensemble_losses

    def step(self, tokens_BL: Tensor, targets_N: Tensor) -> list[float]:
        """One update of every student; their losses before it."""
        logits = [forward(input_ids=tokens_BL, use_cache=False).logits.flatten(0, 1) for forward in self.forwards]
        losses = self.losses(logits, targets_N, len(logits))
        torch.stack(losses).sum().backward()  # peers are detached: each student gets its own loss's gradient
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses).tolist()


def _model(student: StudentConfig, weights: Mapping[str, Tensor], vocabulary: int) -> LlamaForCausalLM:
    shape = LlamaShape.of(student, vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=student.hidden,
            intermediate_size=student.ffn,
            num_hidden_layers=student.layers,
            num_attention_heads=student.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=student.positions,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=student.tied,
        )
    )
    model.load_state_dict(dict(weights))
    return model.train()
