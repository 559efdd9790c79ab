"""Adapters in models of Hugging Face transformers."""
