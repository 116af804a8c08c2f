"""Ranks working on one video: the mesh of processes and the split of the sequence over them."""
