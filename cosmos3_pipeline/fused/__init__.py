"""Ops that an accelerator computes in one pass over memory, where plain ops would take several."""
