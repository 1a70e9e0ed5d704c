"""Bundle to engines for one device: TensorRT, TensorRT-RTX, ONNX Runtime; cache keys, inspection."""
