"""Texts that the students write, for the report.

B texts, L tokens, D hidden, V vocabulary.
"""

import torch

from engine.data.batches import Batch
from engine.data.tokenizer import Tokenizer
from engine.students.cohort import Cohort
from engine.students.student import Student

TEMPERATURE = 0.8


def samples(cohort: Cohort, tokenizer: Tokenizer, count: int, tokens: int) -> list[list[str]]:
    """Returns `count` texts of at most `tokens` tokens per student, the same on every rank; a collective call."""
    if count == 0:
        return [[] for _ in cohort]
    with cohort.evaluating():
        return [_sample(student, tokenizer, count, tokens) for student in cohort]


def _sample(student: Student, tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    alone, device = Cohort([student], student.runtime), student.runtime.device
    generator = torch.Generator().manual_seed(student.config.seed)
    # A text begins behind the boundary token or, where the tokenizer has none, behind a newline.
    prompt = [tokenizer.boundary] if tokenizer.boundary is not None else tokenizer.encode("\n")[-1:]
    tokens_BL = torch.tensor([prompt] * count, device=device)
    for _ in range(min(tokens, student.shape.max_length - 1)):
        length = tokens_BL.shape[1]
        last_B = torch.arange(length - 1, count * length, length, device=device)
        with alone.streams(Batch(tokens_BL, tokens_BL[:, -1], rows_N=last_B)) as [(hidden_BD, head_VD, _)]:
            logits_BV = (hidden_BD @ head_VD.T).float().cpu()
        next_B1 = torch.multinomial((logits_BV / TEMPERATURE).softmax(-1), 1, generator=generator)
        tokens_BL = torch.cat([tokens_BL, next_B1.to(device)], dim=1)
    texts = []
    for ids in tokens_BL[:, len(prompt) :].tolist():
        end = ids.index(tokenizer.boundary) if tokenizer.boundary in ids else len(ids)
        texts.append(tokenizer.decode(ids[:end]).strip())
    return texts
