"""Requirements on the machine code of the prefill kernels; read by `tests/kernels/compiled.py`."""

from itertools import product

import torch

from flexmoe.kernels.experts.prefill_kernel import combine_launch, down_launch, gate_up_launch, sort_launch
from tests.kernels.compiled import SHARED_MEMORY, Case

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SORTED = {"token_of_row": "*i32", "expert_of_block": "*i32", "table": "*i64"}
NUMBERS = {"T": "i32", "n_blocks": "i32", "H8": "i32", "E": "i32", "MAX_I8": "i32"}


def _gate_up(dtype: torch.dtype, rows_each: int, gated: bool, activation: str, arch: int) -> Case:
    pointer = f"*{NAMES[dtype]}"
    return Case(
        name=f"prefill.gate_up.{NAMES[dtype]}.{rows_each}.{activation}.{'gated' if gated else 'plain'}.sm{arch}",
        kernel="experts.prefill_kernel.gate_up_rows_kernel",
        signature={"x_TH": pointer, **SORTED, "h_RI": pointer, "x_stride": "i32", **NUMBERS},
        launch={
            "GATED": gated,
            "UP_BIASED": not gated,
            "GATE_BIASED": False,
            "ACTIVATION": activation,
            **gate_up_launch(dtype.itemsize, rows_each, gated, SHARED_MEMORY[arch]),
        },
        aligned=("x_TH", *SORTED, "h_RI", "x_stride"),
        gpus=(arch,),
        wide_share=0.75,
        products={80: "mma.sync", 90: "wgmma"} if dtype.itemsize == 2 else {},
    )


def _down(dtype: torch.dtype, rows_each: int, arch: int) -> Case:
    pointer = f"*{NAMES[dtype]}"
    return Case(
        name=f"prefill.down.{NAMES[dtype]}.{rows_each}.sm{arch}",
        kernel="experts.prefill_kernel.down_rows_kernel",
        signature={"h_RI": pointer, **SORTED, "output_RH": pointer, "x_TH": pointer, **NUMBERS},
        launch={"DOWN_BIASED": True, **down_launch(dtype.itemsize, rows_each, SHARED_MEMORY[arch])},
        aligned=("h_RI", *SORTED, "output_RH", "x_TH"),
        gpus=(arch,),
        wide_share=0.75,
        products={80: "mma.sync", 90: "wgmma"} if dtype.itemsize == 2 else {},
    )


def _sort(experts: int) -> tuple[Case, Case]:
    launch = sort_launch(experts)
    pointers = ("ids_TK", "counts_PE", "token_of_row", "row_of_slot_TK", "expert_of_block")
    count = Case(
        name=f"prefill.count.{experts}",
        kernel="experts.prefill_kernel.count_kernel",
        signature={"ids_TK": "*i32", "counts_PE": "*i32", "n_pairs": "i32", "E": "i32", "steps": "i32"},
        launch=launch,
        aligned=pointers[:2],
        quick=experts == 7,
    )
    place = Case(
        name=f"prefill.place.{experts}",
        kernel="experts.prefill_kernel.place_kernel",
        signature={
            **dict.fromkeys(pointers, "*i32"),
            **dict.fromkeys(("n_pairs", "E", "steps", "T", "K", "n_blocks"), "i32"),
        },
        launch={**launch, "BLOCK_M": 128},
        aligned=pointers,
    )
    return count, place


def _combine(dtype: torch.dtype) -> Case:
    pointer = f"*{NAMES[dtype]}"
    return Case(
        name=f"prefill.combine.{NAMES[dtype]}",
        kernel="experts.prefill_kernel.combine_kernel",
        signature={
            "output_RH": pointer,
            "row_of_slot_TK": "*i32",
            "top_weights_TK": "*fp32",
            "y_TH": pointer,
            "T": "i32",
            "H8": "i32",
            "K": "i32",
        },
        launch=combine_launch(4096),
        aligned=("output_RH", "row_of_slot_TK", "top_weights_TK", "y_TH"),
        quick=dtype == torch.bfloat16,
        wide_share=0.5,
    )


KINDS = ((True, "silu"), (False, "gelu"), (True, "gelu_tanh"), (False, "relu"))
CASES = (
    *(_gate_up(dtype, rows, *kind, arch) for dtype, rows, kind, arch in product(NAMES, (64, 4096), KINDS, (80, 90))),
    *(_down(dtype, rows, arch) for dtype, rows, arch in product(NAMES, (64, 4096), (80, 90))),
    *(case for experts in (1, 7, 64) for case in _sort(experts)),
    *(_combine(dtype) for dtype in NAMES),
)
