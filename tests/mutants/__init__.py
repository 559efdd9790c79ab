"""Mutants: sources with one fault put in by hand, to see which of them the tests notice. Run by `make mutants-cpu`."""
