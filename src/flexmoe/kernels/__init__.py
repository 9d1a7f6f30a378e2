"""Fused GPU implementation of the expert layers: operators, Triton kernels, dispatch and CUDA graphs.

One folder per operator (`route`, `experts`, `low_rank`) with its reference in plain PyTorch, its kernels and its
registration in `torch.ops.flexmoe`; the tests and benchmarks go by the same names. Registered as
`experts_implementation="flexmoe_triton"`. Does not cover the implementations for CPUs (`flexmoe.cpu`).
"""
