"""The parameters of an adapter: configuration, layers, files and cached prefixes."""
