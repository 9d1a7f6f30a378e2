"""Requirements on the machine code of the router's kernels; read by `tests/kernels/compiled.py`."""

from itertools import product

import torch

from flexmoe.kernels.route.kernel import backward_launch, few_launch, many_launch
from tests.kernels.compiled import Case

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RESULTS = {"logits": "*fp32", "weights": "*fp32", "top_weights": "*fp32", "top_ids": "*i32"}
NUMBERS = {"E": "i32", "K": "i32", "H_8": "i32", "x_stride": "i32", "offset_stride": "i32"}
ALIGNED = ("x", "table", "offset", *RESULTS, "H_8", "x_stride")


def _forward(experts: int, x_dtype: torch.dtype, row_dtype: torch.dtype) -> list[Case]:
    inputs = {"x": f"*{NAMES[x_dtype]}", "table": "*i64", "offset": "*fp32", **RESULTS}
    kind = f"{experts}.{NAMES[x_dtype]}.{NAMES[row_dtype]}"
    few = Case(
        name=f"route.few.{kind}",
        kernel="route.kernel.route_few",
        signature={**inputs, **NUMBERS},
        launch={"RENORMALIZE": True, **few_launch(experts, row_dtype)},
        aligned=ALIGNED,
        # the rest are addresses; 0 if rows are read in smaller pieces, as a single row of a 2-byte dtype is
        wide_share=0.3 if experts > 1 else 0.0,
    )
    many = [
        Case(
            name=f"route.many.{kind}.{tokens}",
            kernel="route.kernel.route_many",
            signature={**inputs, "T": "i32", **NUMBERS},
            launch={"RENORMALIZE": True, **many_launch(experts, row_dtype, tokens)},
            aligned=ALIGNED,
            wide_share=0.4,
            products={80: "mma.sync", 90: "mma.sync"},
        )
        for tokens in (512, 4096)
    ]
    return [few, *many]


def _backward(experts: int, x_dtype: torch.dtype, row_dtype: torch.dtype) -> Case:
    return Case(
        name=f"route.backward.{experts}.{NAMES[x_dtype]}.{NAMES[row_dtype]}",
        kernel="route.kernel.backward_kernel",
        signature={
            **dict.fromkeys(("d_logits", "d_weights", "d_top_weights"), "*fp32"),
            "table": "*i64",
            "logits": "*fp32",
            "weights": "*fp32",
            "top_ids": "*i32",
            "dz": "*fp32",
            "dx": f"*{NAMES[x_dtype]}",
            **dict.fromkeys(("T", "E", "K", "H_8"), "i32"),
        },
        launch={"RENORMALIZE": False, **backward_launch(experts, row_dtype)},
        aligned=("d_logits", "d_weights", "d_top_weights", "table", "logits", "weights", "top_ids", "dz", "dx", "H_8"),
        quick=experts == 7 and x_dtype == torch.bfloat16 and row_dtype == torch.float32,
    )


KINDS = [
    (experts, x_dtype, row_dtype)
    for experts, (x_dtype, row_dtype) in product((1, 7, 64), product(NAMES, NAMES))
    if row_dtype in (torch.float32, x_dtype)
]
CASES = (*(case for kind in KINDS for case in _forward(*kind)), *(_backward(*kind) for kind in KINDS))
