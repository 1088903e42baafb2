"""Compare revisions, saved configs or lists of overrides: the consequences of a change. Imports no torch."""
