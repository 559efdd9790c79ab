"""A language model that learns to see digits, and one that learns to hear melodies; no model or data set is downloaded."""
