"""Running experts on CPUs: products where torch's own are slow, single tokens, and models prepacked for decoding."""
