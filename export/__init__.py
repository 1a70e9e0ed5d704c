"""A diffusers text-to-video folder to an ONNX bundle; torch is needed here and nowhere later."""
