"""The use cases, the same for every surface; no web framework and no wire format."""
