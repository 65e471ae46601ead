"""Rewrites of ONNX models, and how they are written to disk."""
