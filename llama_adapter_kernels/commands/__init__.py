"""The subcommands of `llama-adapter`, one module each. Nothing here imports torch or transformers before it runs."""
