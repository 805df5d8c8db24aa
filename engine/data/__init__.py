"""From text to batches: sources, cleaning, split, tokenizer, token files, the steps that read them, and masking."""
