"""The paper's tasks: one file per task over shared metrics, resumable predictions, tables beside published numbers."""
