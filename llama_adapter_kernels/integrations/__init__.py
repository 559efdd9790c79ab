"""Adapters in other people's models: one file per library."""
