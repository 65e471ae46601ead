"""Change the graph: load, trace, partition, prune, fold, rewrite to sparse ops, lower to ONNX."""
