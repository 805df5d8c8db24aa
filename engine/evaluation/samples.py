"""Text that the students write, for the report.

B samples, L positions, D hidden, V vocabulary.
"""

import torch

from engine.data.batches import Batch
from engine.data.tokenizer import Tokenizer
from engine.students.cohort import Cohort
from engine.students.student import Student

TEMPERATURE = 0.8


def samples(cohort: Cohort, tokenizer: Tokenizer, count: int, tokens: int) -> list[list[str]]:
    """`count` texts of up to `tokens` tokens from each student; a collective call, the same texts on every rank."""
    if count == 0:
        return [[] for _ in cohort]
    with cohort.evaluating():
        return [_write(cohort, student, tokenizer, count, tokens) for student in cohort]


def _write(cohort: Cohort, student: Student, tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    device = student.runtime.device
    generator = torch.Generator().manual_seed(student.config.seed)
    # Where the text has no boundary token, a newline is where something may begin.
    first = [tokenizer.boundary] if tokenizer.boundary is not None else tokenizer.encode("\n")[-1:]
    written_BL = torch.tensor([first] * count, device=device)
    for _ in range(min(tokens, student.shape.max_length - 1)):
        length = written_BL.shape[1]
        last_B = torch.arange(length - 1, count * length, length, device=device)
        hidden_BD = student.body(Batch(written_BL, written_BL[:, -1], rows_N=last_B))
        with cohort.gathered_heads():
            logits_BV = (hidden_BD @ student.model.head.T).float().cpu()
        chosen_B1 = torch.multinomial((logits_BV / TEMPERATURE).softmax(-1), 1, generator=generator)
        written_BL = torch.cat([written_BL, chosen_B1.to(device)], dim=1)
    texts = []
    for row in written_BL[:, len(first) :].tolist():
        end = row.index(tokenizer.boundary) if tokenizer.boundary in row else len(row)
        texts.append(tokenizer.decode(row[:end]).strip())
    return texts
