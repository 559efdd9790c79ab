"""PEFT: its AdaptionPrompt on the fused operation, and this package's adapter as one of its methods."""
