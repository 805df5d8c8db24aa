"""The model families by name: from a student's settings to its shape, from a shape to a model.

A new family needs a module beside this one with its Shape and its LanguageModel (engine.models.base), an entry in both
tables below, its name in StudentConfig.family and SearchConfig.family, an entry in `_FORMATS` of
engine.models.huggingface, and in `engine.models.base.initial_weights` the names of its projections into the residual
stream. FLOPs, checks and evaluation ask the Shape and need nothing; engine.compute.memory estimates by `mlp_matrices`.
"""

from functools import cache
from typing import Any

import torch

from engine.config.settings import StudentConfig
from engine.models.base import LanguageModel, Shape
from engine.models.gpt2 import GPT2, GPT2Shape
from engine.models.llama import Llama, LlamaShape
from engine.models.roberta import Roberta, RobertaShape

SHAPES: dict[str, type[Shape]] = {shape.family: shape for shape in (LlamaShape, GPT2Shape, RobertaShape)}
_MODELS: dict[str, Any] = {"llama": Llama, "gpt2": GPT2, "roberta": Roberta}


def shape_of(student: StudentConfig, vocab_size: int) -> Shape:
    """Returns the shape of a student's model; UserError where its settings do not fit one another or the family."""
    return SHAPES[student.family].from_settings(student, vocab_size)


def new_model(shape: Shape, *, recompute: bool = False) -> LanguageModel:
    """Returns a model of that shape, with torch's own initial weights."""
    return _MODELS[shape.family](shape, recompute=recompute)


@cache
def parameter_count(shape: Shape) -> int:
    """Returns the number of a model's parameters, without making the model; a shared weight counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in new_model(shape).parameters())
