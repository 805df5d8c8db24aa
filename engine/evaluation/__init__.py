"""How good models are: held-out loss, zero-shot tasks, fine-tuning, and samples of what they write."""
