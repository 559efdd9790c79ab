"""Fine-tuning: rows to tokens, packing, the training loop and its output folder."""
