"""The implementations that the package adds to `EXPERTS_FORWARDS`, and which of them "auto" takes.

Choose one with `from_pretrained(..., experts_implementation=...)` or `model.set_experts_implementation(...)`. Does not
cover how they run (`flexmoe.cpu`, `flexmoe.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexmoe.cpu.forward import cpu_experts_forward
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock, eager_experts_forward
from flexmoe.modeling.masking_flexmoe import ForwardContext


def auto_experts_forward(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], context: ForwardContext, zeros: Sequence[Tensor] = ()
) -> Tensor:
    """`experts_implementation="auto"`: "flexmoe_cpu" on a CPU, "flexmoe_triton" on GPUs where it was measured to be
    faster (none yet), "eager" elsewhere. Arguments and result as those of `eager_experts_forward`."""
    if x_TH.device.type == "cpu":
        return cpu_experts_forward(block, x_TH, names, context, zeros)
    if x_TH.is_cuda:
        from flexmoe.kernels.forward import auto_takes_triton, triton_experts_forward  # imports Triton

        if auto_takes_triton(x_TH):
            return triton_experts_forward(block, x_TH, names, context, zeros)
    return eager_experts_forward(block, x_TH, names, context, zeros)


__all__ = ["auto_experts_forward"]
