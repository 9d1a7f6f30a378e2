"""FlexMoE: mixture-of-experts language models whose training data stays with its owners.

Importing it registers the model with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`,
`AutoModelForSequenceClassification` and `AutoModelForTokenClassification`.
Not here: the command line (`flexmoe_cli`) and any code of its own beyond the registration.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from flexmoe.io.package_config import ExpertPackageConfig
from flexmoe.modeling.configuration_flexmoe import EXPERTS_FORWARDS, FlexMoeConfig
from flexmoe.registration import LazyModelClass

if TYPE_CHECKING:
    from flexmoe.admission.verification import Verdict, verify
    from flexmoe.card_files import write_card
    from flexmoe.composition.edit import compose_by_reference, update_composition
    from flexmoe.conversion.compose import add, compose, remove
    from flexmoe.conversion.export import export
    from flexmoe.conversion.import_flex_olmo import import_flex_olmo
    from flexmoe.conversion.low_rank import compress, densify
    from flexmoe.evaluation import evaluate
    from flexmoe.grafting import graft
    from flexmoe.hub.publish import push
    from flexmoe.hub.pull import pull
    from flexmoe.inspection import inspect
    from flexmoe.kernels.graphs import CapturedForward
    from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel, UnsupportedAnchorError
    from flexmoe.packages.package import ExpertPackage
    from flexmoe.packages.signing import keygen, sign
    from flexmoe.packages.trust import TrustPolicy
    from flexmoe.peft import expert_lora_config
    from flexmoe.planning.plan import Plan, plan
    from flexmoe.training.experts import train_expert
    from flexmoe.training.fit_router import fit_router
    from flexmoe.training.settings import TrainingSettings
    from flexmoe.usage import track_usage

__version__ = "0.1.0"

AutoConfig.register("flexmoe", FlexMoeConfig, exist_ok=True)
AutoConfig.register("flexmoe_expert", ExpertPackageConfig, exist_ok=True)  # it says what an expert package is for
AutoModel.register(FlexMoeConfig, LazyModelClass("FlexMoeModel"), exist_ok=True)
AutoModelForCausalLM.register(FlexMoeConfig, LazyModelClass("FlexMoeForCausalLM"), exist_ok=True)
for _auto, _name in (
    (AutoModelForSequenceClassification, "FlexMoeForSequenceClassification"),
    (AutoModelForTokenClassification, "FlexMoeForTokenClassification"),
):
    _auto.register(FlexMoeConfig, LazyModelClass(_name, "flexmoe.classification"), exist_ok=True)
EXPERTS_FORWARDS.register("auto", "flexmoe.implementations:auto_experts_forward")
EXPERTS_FORWARDS.register("flexmoe_cpu", "flexmoe.cpu.forward:cpu_experts_forward")
EXPERTS_FORWARDS.register("flexmoe_triton", "flexmoe.kernels.forward:triton_experts_forward")
EXPERTS_FORWARDS.register("flexmoe_training", "flexmoe.training.mixing:training_experts_forward")
EXPERTS_FORWARDS.default = "auto"

# Imported on first use: a config needs no model, and loading a model neither datasets nor a trainer.
_LAZY = {
    "ExpertPackage": "flexmoe.packages.package",
    "FlexMoeForCausalLM": "flexmoe.modeling",
    "FlexMoeModel": "flexmoe.modeling",
    "UnsupportedAnchorError": "flexmoe.modeling",
    "track_usage": "flexmoe.usage",
    "TrustPolicy": "flexmoe.packages.trust",
    "write_card": "flexmoe.card_files",
    "add": "flexmoe.conversion.compose",
    "compose": "flexmoe.conversion.compose",
    "compose_by_reference": "flexmoe.composition.edit",
    "remove": "flexmoe.conversion.compose",
    "update_composition": "flexmoe.composition.edit",
    "export": "flexmoe.conversion.export",
    "import_flex_olmo": "flexmoe.conversion.import_flex_olmo",
    "compress": "flexmoe.conversion.low_rank",
    "densify": "flexmoe.conversion.low_rank",
    "evaluate": "flexmoe.evaluation",
    "graft": "flexmoe.grafting",
    "CapturedForward": "flexmoe.kernels.graphs",
    "inspect": "flexmoe.inspection",
    "expert_lora_config": "flexmoe.peft",
    "Plan": "flexmoe.planning.plan",
    "plan": "flexmoe.planning.plan",
    "keygen": "flexmoe.packages.signing",
    "pull": "flexmoe.hub.pull",
    "push": "flexmoe.hub.publish",
    "sign": "flexmoe.packages.signing",
    "TrainingSettings": "flexmoe.training.settings",
    "train_expert": "flexmoe.training.experts",
    "fit_router": "flexmoe.training.fit_router",
    "Verdict": "flexmoe.admission.verification",
    "verify": "flexmoe.admission.verification",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flexmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "CapturedForward",
    "ExpertPackage",
    "FlexMoeConfig",
    "FlexMoeForCausalLM",
    "FlexMoeModel",
    "Plan",
    "TrainingSettings",
    "TrustPolicy",
    "UnsupportedAnchorError",
    "Verdict",
    "add",
    "compose",
    "compose_by_reference",
    "compress",
    "densify",
    "evaluate",
    "expert_lora_config",
    "export",
    "fit_router",
    "graft",
    "import_flex_olmo",
    "inspect",
    "keygen",
    "plan",
    "pull",
    "push",
    "remove",
    "sign",
    "track_usage",
    "train_expert",
    "update_composition",
    "verify",
    "write_card",
]
