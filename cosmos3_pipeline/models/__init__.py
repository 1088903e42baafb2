"""The weights of a run: looking at a checkpoint, loading its parts, making the toy model. Imports no torch."""
