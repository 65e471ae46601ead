"""The sparse ops, one file each: layout byte for byte, pack and unpack, torch op, ONNX node and function body."""
