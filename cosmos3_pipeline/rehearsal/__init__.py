"""Rehearsals: the real code runs on tensors without values, and its memory, kernels and messages are counted."""
