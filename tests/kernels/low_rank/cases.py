"""Requirements on the machine code of the kernels of low-rank experts; read by `tests/kernels/compiled.py`."""

from itertools import product

import torch

from flexmoe.kernels.low_rank.kernel import low_rank_down_launch, low_rank_gate_up_launch, shrink_launch, splits_of
from flexmoe.kernels.triton_common import A_DOWN, A_GATE
from tests.kernels.compiled import SHARED_MEMORY, Case

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOKENS = (1, 32, 64)
RANKS = ([16] * 7, [64, 8], [40, 3, 100])  # loads of 16 bytes possible, small and large ranks; not possible
KINDS = ((True, "silu"), (False, "gelu"), (True, "gelu_tanh"), (False, "relu"))
SMS = 132  # of an H100
HIDDEN, INTERMEDIATE = 4096, 11008
LEAST_SHARED = min(SHARED_MEMORY.values())


def _max_stack(dtype: torch.dtype, tokens: int, ranks: list[int], is_usual: bool) -> int:
    if dtype.itemsize == 4 and tokens == 64:
        return 512  # float32 is multiplied in registers, and these tokens and members need more than there are
    # some versions of ptxas spill a few numbers that are needed again once per member
    return 0 if is_usual and dtype == torch.bfloat16 and tokens in (1, 64) and ranks == RANKS[0] else 32


def _shrink(dtype: torch.dtype, tokens: int, gate_up: bool) -> Case:
    pointer = f"*{NAMES[dtype]}"
    launch = shrink_launch(dtype.itemsize, tokens, HIDDEN if gate_up else INTERMEDIATE, LEAST_SHARED)
    return Case(
        name=f"low_rank.shrink.{NAMES[dtype]}.{tokens}.{'gate_up' if gate_up else 'down'}",
        kernel="low_rank.kernel.shrink_kernel",
        signature={
            "v_TK": pointer,
            "weights_TM": "*fp32",
            "table": "*i64",
            "parts_MASTR": "*fp32",
            "x_TH": pointer,
            **dict.fromkeys(("v_stride", "T", "K8", "M", "MAX_R8"), "i32"),
        },
        launch={
            "FIRST": (A_GATE if gate_up else A_DOWN).value,
            "MATRICES": 2 if gate_up else 1,
            "PER_MEMBER": not gate_up,
            **launch,
        },
        aligned=("v_TK", "weights_TM", "table", "parts_MASTR", "x_TH", "v_stride"),
        quick=dtype == torch.bfloat16 and tokens == 64 and not gate_up,
        wide_share=0.85,
        products=dict.fromkeys(SHARED_MEMORY, "mma.sync") if dtype.itemsize == 2 else {},
    )


def _gate_up(dtype: torch.dtype, tokens: int, ranks: list[int], gated: bool, activation: str) -> Case:
    pointer = f"*{NAMES[dtype]}"
    form = f"{activation}.{'gated' if gated else 'plain'}.{max(ranks)}"
    return Case(
        name=f"low_rank.gate_up.{NAMES[dtype]}.{tokens}.{form}",
        kernel="low_rank.kernel.gate_up_kernel",
        signature={
            "x_TH": pointer,
            "weights_TM": "*fp32",
            "public": "*i64",
            "table": "*i64",
            "parts_MASTR": "*fp32",
            "h_MTI": pointer,
            "hidden_TI": pointer,
            **dict.fromkeys(("x_stride", "T", "H8", "I8", "M", "MAX_R8"), "i32"),
        },
        launch={
            "GATED": gated,
            "UP_BIASED": not gated,
            "GATE_BIASED": False,
            "ACTIVATION": activation,
            "SPLITS": splits_of(HIDDEN),
            **low_rank_gate_up_launch(dtype.itemsize, tokens, gated, ranks, len(ranks) + 1, LEAST_SHARED),
        },
        aligned=("x_TH", "weights_TM", "public", "table", "parts_MASTR", "h_MTI", "hidden_TI", "x_stride"),
        max_stack=_max_stack(dtype, tokens, ranks, activation == "silu"),
        wide_share=0.4 if ranks in RANKS[:2] else 0.2,
        products={80: "mma.sync", 90: "wgmma"} if dtype.itemsize == 2 else {},
    )


def _down(dtype: torch.dtype, tokens: int, ranks: list[int], hidden: int) -> Case:
    pointer = f"*{NAMES[dtype]}"
    launch = low_rank_down_launch(dtype.itemsize, tokens, hidden, ranks, len(ranks) + 1, SMS, LEAST_SHARED)
    return Case(
        name=f"low_rank.down.{NAMES[dtype]}.{tokens}.{hidden}.{max(ranks)}",
        kernel="low_rank.kernel.down_kernel",
        signature={
            "hidden_TI": pointer,
            "weights_TM": "*fp32",
            "public": "*i64",
            "table": "*i64",
            "parts_MSTR": "*fp32",
            "y_TH": pointer,
            "x_TH": pointer,
            **dict.fromkeys(("T", "H8", "I8", "M", "MAX_R8"), "i32"),
        },
        launch={
            "DOWN_BIASED": hidden == 2048,
            "SPLITS": splits_of(INTERMEDIATE),
            **launch,
        },
        aligned=("hidden_TI", "weights_TM", "public", "table", "parts_MSTR", "y_TH", "x_TH"),
        max_stack=_max_stack(dtype, tokens, ranks, hidden == HIDDEN),
        wide_share=0.4 if ranks in RANKS[:2] else 0.2,
        products={80: "mma.sync", 90: "wgmma" if launch["ROWS"] == 64 else "mma.sync"} if dtype.itemsize == 2 else {},
    )


CASES = (
    *(_shrink(*key) for key in product(NAMES, TOKENS, (True, False))),
    *(_gate_up(dtype, tokens, ranks, *kind) for dtype, tokens, ranks, kind in product(NAMES, TOKENS, RANKS, KINDS)),
    *(_down(*key) for key in product(NAMES, TOKENS, RANKS, (2048, 4096))),
)
