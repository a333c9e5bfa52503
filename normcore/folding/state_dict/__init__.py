"""Folding of checkpoints without a graph: names, shapes and statistics are evidence, never a proof."""
