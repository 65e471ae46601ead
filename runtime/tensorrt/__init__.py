"""Build TensorRT engines, find out what is in them, and run them."""
