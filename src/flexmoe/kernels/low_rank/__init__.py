"""The weighted mix of low-rank experts as one operator: the public network is read once for all of them."""
