"""Analyses and rewrites of the traced FX graph, one a file."""
