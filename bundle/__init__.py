"""What an ONNX bundle and an engine set are: specs, schedules, manifests, hashes; numpy only."""
