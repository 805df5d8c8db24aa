"""lm-eval's log-probabilities of many texts, for benchmarks/scoring.py; runs where lm-eval is installed.

    python lm_eval_pairs.py <Hugging Face folder> <texts between NULs> <threads>

It reads batch sizes from standard input, one per line. For each it scores all texts once and prints `done`.
"""

import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

student, texts, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
with open(texts, encoding="utf-8", newline="") as file:
    sentences = file.read().split("\0")
answers, sys.stdout = sys.stdout, sys.stderr  # lm-eval prints.
model = HFLM(pretrained=student, dtype="float32", device="cpu")
requests = [Instance("loglikelihood", {}, ("", sentence), i) for i, sentence in enumerate(sentences)]
for line in sys.stdin:
    model.batch_size_per_gpu = int(line)
    scores = model.loglikelihood(requests, disable_tqdm=True)
    assert len(scores) == len(sentences)
    print("done", file=answers, flush=True)
