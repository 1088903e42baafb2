"""A checkpoint on disk: whose it is, whether it is whole and ours, before anything heavy. Imports no torch."""
