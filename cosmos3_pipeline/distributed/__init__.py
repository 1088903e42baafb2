"""Ranks: mesh axes and groups, starting processes, the few collectives used, and what they cost.

Importing this package imports no torch; its modules are imported where they are used.
"""
