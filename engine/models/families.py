"""The architectures by name: from a student's settings to its shape, from a shape to a model."""

from torch import nn

from engine.config import StudentConfig
from engine.models.gpt2 import GPT2, GPT2Shape
from engine.models.llama import Llama, LlamaShape

Shape = LlamaShape | GPT2Shape
Model = Llama | GPT2


def shape_of(student: StudentConfig, vocabulary: int) -> Shape:
    """Raises ValueError where the settings do not fit one another or the family."""
    return (GPT2Shape if student.family == "gpt2" else LlamaShape).of(student, vocabulary)


def model_of(shape: Shape, *, recompute: bool = False) -> Model:
    """The model, with torch's own initial weights."""
    return GPT2(shape, recompute=recompute) if isinstance(shape, GPT2Shape) else Llama(shape, recompute=recompute)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
