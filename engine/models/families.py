"""The architectures by name: from a student's settings to its shape, from a shape to a model.

N rows to predict, D hidden.
"""

import torch
from torch import Tensor

from engine.config import StudentConfig
from engine.models.classifier import Classifier
from engine.models.gpt2 import GPT2, GPT2Shape
from engine.models.llama import Llama, LlamaShape
from engine.models.roberta import Roberta, RobertaShape
from kernels import Projected

Shape = LlamaShape | GPT2Shape | RobertaShape
Model = Llama | GPT2 | Roberta

_SHAPES = {"llama": LlamaShape, "gpt2": GPT2Shape, "roberta": RobertaShape}
_MODELS = {LlamaShape: Llama, GPT2Shape: GPT2, RobertaShape: Roberta}


def shape_of(student: StudentConfig, vocabulary: int) -> Shape:
    """Raises ValueError where the settings do not fit one another or the family."""
    return _SHAPES[student.family].of(student, vocabulary)


def model_of(shape: Shape, *, recompute: bool = False) -> Model:
    """The model, with torch's own initial weights."""
    return _MODELS[type(shape)](shape, recompute=recompute)


def projected(model: Model | Classifier, hidden_ND: Tensor) -> Projected:
    """The model's stream of logits, from its hidden states."""
    return Projected(hidden_ND, model.head, model.head_bias if isinstance(model, Roberta | Classifier) else None)


def parameter_count(shape: Shape) -> int:
    """Of the model, which is not made; what is tied counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_of(shape).parameters())
