"""The weighted mix of full experts as one operator, with a kernel for decoding and one for prefill."""
