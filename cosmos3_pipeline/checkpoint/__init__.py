"""Checks of a checkpoint on disk before weights are read: its origin and its completeness. Imports no torch."""
