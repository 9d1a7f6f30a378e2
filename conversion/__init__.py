"""Conversion of checkpoints on disk, streamed one tensor at a time. Does not cover live models."""
