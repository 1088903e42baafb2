"""The weights of a run: inspecting a checkpoint, loading its parts, making the toy model. Imports no torch."""
