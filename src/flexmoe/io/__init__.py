"""Files: safetensors as streams, hashing, atomic folders, strict JSON, dense checkpoints."""
