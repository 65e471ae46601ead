"""Decide what goes: statistics, scores, masks, channel orders. Pure functions on tensors; knows no graph."""
