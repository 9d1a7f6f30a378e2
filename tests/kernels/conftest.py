"""What the kernels' tests need on a GPU."""

import os

# Tests fill what nobody has written by asking for determinism, and cuBLAS must then be told how to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
