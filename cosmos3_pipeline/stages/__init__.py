"""The stages of a run, in the order in which the data moves: text to export. Imports no torch."""

STAGES = ("text", "encode", "denoise", "sound", "decode", "export")
