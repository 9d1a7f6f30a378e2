"""The router as one operator: logits, mask, softmax, top-k."""
