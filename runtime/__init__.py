"""Engines to frames: sessions, the step loop, prompts, noise, video files; no torch, no ONNX."""
