"""Checkpoints: files of untrusted origin to models, hardened; what they hold, described without running them."""
