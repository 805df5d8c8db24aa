"""Published shapes by name, as settings of a student: what `preset` names.

Parameter counts are for a vocabulary of 16,000 tokens, and of 50,265 for the RoBERTas.

Sources: Baby Llama (Timiryasov & Tastet 2023), BabyLlama-2 (Tastet & Timiryasov 2024), When Babies Teach Babies (Iyer
2024).
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Baby Llama's student, 58.34M
    "baby-llama-58m": dict(layers=16, hidden=512, heads=8, ffn=1024, tied=False, max_length=256),
    # Baby Llama's LLaMA teacher, 359.97M
    "llama-360m": dict(layers=24, hidden=1024, heads=8, ffn=3072, tied=False, max_length=256),
    # Baby Llama's GPT-2 teacher, 704.7M (the later files give it 256 positions)
    "gpt2-705m": dict(family="gpt2", layers=24, hidden=1536, heads=16, ffn=6144, max_length=128, dropout=0.1),
    # BabyLlama-2's teachers and student alike, 345.4M
    "smol-llama-345m": dict(layers=32, hidden=960, heads=15, kv_heads=5, ffn=2560, tied=False, max_length=256),
    # What the search of When Babies Teach Babies found for N/2 to N/5 parameters, where N is RoBERTa-base's number. The
    # paper does not give the number of heads. They have 59.9M, 42.6M, 27.8M and 24.2M.
    "babies-60m": dict(family="roberta", layers=8, hidden=512, heads=8, ffn=3072, max_length=512, dropout=0.1),
    "babies-43m": dict(family="roberta", layers=16, hidden=256, heads=8, ffn=3072, max_length=512, dropout=0.1),
    "babies-28m": dict(family="roberta", layers=8, hidden=256, heads=8, ffn=3072, max_length=512, dropout=0.1),
    "babies-24m": dict(family="roberta", layers=6, hidden=256, heads=8, ffn=3072, max_length=512, dropout=0.1),
}
