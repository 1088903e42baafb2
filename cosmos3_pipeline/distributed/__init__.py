"""Ranks: mesh axes and groups, the start of processes, the few collectives in use, and their cost.

Importing this package imports no torch, because it imports none of its modules.
"""
