"""Recompute the running statistics of a network's batch norms from data, or say how far data have moved from them."""
