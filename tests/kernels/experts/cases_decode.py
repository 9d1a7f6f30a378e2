"""Requirements on the machine code of the decode kernels; read by `tests/kernels/compiled.py`."""

from itertools import product

import torch

from flexmoe.kernels.experts.decode_kernel import down_launch, gate_up_launch
from tests.kernels.compiled import SHARED_MEMORY, Case

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NUMBERS = {"T": "i32", "H8": "i32", "E": "i32", "MAX_I8": "i32"}
TOKENS = (1, 32, 64)
SMS = 132  # of an H100
LEAST_SHARED = min(SHARED_MEMORY.values())


def _gate_up(dtype: torch.dtype, tokens: int, gated: bool, activation: str) -> Case:
    pointer = f"*{NAMES[dtype]}"
    return Case(
        name=f"decode.gate_up.{NAMES[dtype]}.{tokens}.{activation}.{'gated' if gated else 'plain'}",
        kernel="experts.decode_kernel.gate_up_kernel",
        signature={
            "x_TH": pointer,
            "weights_TE": "*fp32",
            "table": "*i64",
            "h_ETI": pointer,
            "x_stride": "i32",
            **NUMBERS,
        },
        launch={
            "GATED": gated,
            "UP_BIASED": not gated,
            "GATE_BIASED": False,
            "ACTIVATION": activation,
            **gate_up_launch(dtype.itemsize, tokens, gated, LEAST_SHARED),
        },
        aligned=("x_TH", "weights_TE", "table", "h_ETI", "x_stride"),
        quick=dtype == torch.bfloat16 and activation == "silu" and tokens == 64,
        wide_share=0.85,
        products={80: "mma.sync", 90: "wgmma"} if dtype.itemsize == 2 else {},
    )


def _down(dtype: torch.dtype, tokens: int, hidden: int) -> Case:
    pointer = f"*{NAMES[dtype]}"
    launch = down_launch(dtype.itemsize, tokens, hidden, SMS, LEAST_SHARED)
    is_usual = dtype == torch.bfloat16 and hidden == 4096 and tokens in (1, 64)
    return Case(
        name=f"decode.down.{NAMES[dtype]}.{tokens}.{hidden}",
        kernel="experts.decode_kernel.down_kernel",
        signature={
            "h_ETI": pointer,
            "weights_TE": "*fp32",
            "table": "*i64",
            "y_TH": pointer,
            "x_TH": pointer,
            **NUMBERS,
        },
        launch={"DOWN_BIASED": hidden == 2048, "BLOCK_E": 8, **launch},
        aligned=("h_ETI", "weights_TE", "table", "y_TH", "x_TH"),
        # some versions of ptxas spill a few numbers that are needed again once per expert
        max_stack=0 if is_usual else 32,
        wide_share=0.85,
        products={80: "mma.sync", 90: "wgmma" if launch["ROWS"] == 64 else "mma.sync"} if dtype.itemsize == 2 else {},
    )


KINDS = ((True, "silu"), (False, "gelu"), (True, "gelu_tanh"), (False, "relu"))
CASES = (
    *(_gate_up(dtype, tokens, *kind) for dtype, tokens, kind in product(NAMES, TOKENS, KINDS)),
    *(_down(dtype, tokens, hidden) for dtype, tokens, hidden in product(NAMES, TOKENS, (2048, 4096, 8192))),
)
