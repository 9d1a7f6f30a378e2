"""FlexMoE on several ranks: calls that every rank must make, gathering shards.

Distribution itself is done by transformers (`DistributedConfig`) and torch (`fully_shard`, DistributedDataParallel).
Does not cover the plans by which transformers shards (`flexmoe.parallel`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FSDP: tuple[type[Any], ...] = ()
_SHARDED: tuple[type[Any], ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    _FSDP, _SHARDED = (FSDPModule,), (DTensor,)

# Calls that every rank must make


def class_without_fsdp(cls: type) -> type:
    """The class that `fully_shard` derived `cls` from, or `cls` itself: the one with a source file."""
    return next(base for base in cls.__mro__ if not issubclass(base, _FSDP))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 manages the module or a submodule."""
    return any(isinstance(part, _FSDP) for part in module.modules())


def must_run_on_all_ranks(*modules: nn.Module) -> bool:
    """Whether the modules must be called on this rank even if no token is routed to them.

    DDP and FSDP2 reduce gradients once every rank has some, and FSDP2 gathers a module of its own when it is called.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters()):
        return True
    return is_distributed() and any(map(is_fully_sharded, modules))


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


# Shards


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from its shards; every rank must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, _SHARDED) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is sharded over several ranks."""
    return any(isinstance(parameter, _SHARDED) for parameter in module.parameters())
