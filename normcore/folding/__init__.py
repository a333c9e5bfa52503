"""Folding: what batch norm does at inference time moves into the linear operator before it, and is proven equal."""
