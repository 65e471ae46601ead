"""Run what was compiled: CPU kernels, ONNX Runtime sessions, evaluation and benchmarks."""
