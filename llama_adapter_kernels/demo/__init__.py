"""A demonstration that needs no download: see run.py."""
