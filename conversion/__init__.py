"""flexmoe.conversion: checkpoints in, checkpoints out, a tensor at a time. Not here: live models."""
