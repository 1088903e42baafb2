"""Ops that an accelerator computes in one pass over memory instead of the several passes of plain ops."""
