"""What a change of the configuration does: between revisions, files or override lists. Imports no torch."""
