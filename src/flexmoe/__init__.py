"""FlexMoE: mixture-of-experts language models whose training data stays with its owners.

Importing it registers the model with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
Not here: the command line (`flexmoe_cli`) and any code of its own beyond the registration.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flexmoe.modeling.cards_flexmoe import register_card_renderer
from flexmoe.modeling.configuration_flexmoe import ExpertPackageConfig, FlexMoeConfig
from flexmoe.registration import LazyModelClass, full_card

if TYPE_CHECKING:
    from flexmoe.admission import Verdict, verify
    from flexmoe.cards import write_card
    from flexmoe.conversion.by_reference import compose_by_reference
    from flexmoe.conversion.compose import add, compose, remove
    from flexmoe.conversion.export import export
    from flexmoe.conversion.import_flex_olmo import import_flex_olmo
    from flexmoe.conversion.low_rank import compress, densify
    from flexmoe.conversion.pins import update_composition
    from flexmoe.evaluation import evaluate
    from flexmoe.grafting import graft
    from flexmoe.graphs import CapturedForward
    from flexmoe.inspection import inspect
    from flexmoe.modeling import ExpertPackage, FlexMoeForCausalLM, FlexMoeModel, UnsupportedAnchorError, track_usage
    from flexmoe.modeling.trust_flexmoe import TrustPolicy
    from flexmoe.peft import expert_lora_config
    from flexmoe.planning import Plan, plan
    from flexmoe.sharing import pull, push
    from flexmoe.signing import keygen, sign
    from flexmoe.training import TrainingSettings, train_expert

__version__ = "0.1.0"

AutoConfig.register("flexmoe", FlexMoeConfig, exist_ok=True)
AutoConfig.register("flexmoe_expert", ExpertPackageConfig, exist_ok=True)  # it says what an expert package is for
AutoModel.register(FlexMoeConfig, LazyModelClass("FlexMoeModel"), exist_ok=True)
AutoModelForCausalLM.register(FlexMoeConfig, LazyModelClass("FlexMoeForCausalLM"), exist_ok=True)
register_card_renderer(full_card)

# Imported on first use: a config needs no model, and loading a model neither datasets nor a trainer.
_LAZY = {
    "ExpertPackage": "flexmoe.modeling",
    "FlexMoeForCausalLM": "flexmoe.modeling",
    "FlexMoeModel": "flexmoe.modeling",
    "UnsupportedAnchorError": "flexmoe.modeling",
    "track_usage": "flexmoe.modeling",
    "TrustPolicy": "flexmoe.modeling.trust_flexmoe",
    "write_card": "flexmoe.cards",
    "add": "flexmoe.conversion.compose",
    "compose": "flexmoe.conversion.compose",
    "compose_by_reference": "flexmoe.conversion.by_reference",
    "remove": "flexmoe.conversion.compose",
    "update_composition": "flexmoe.conversion.pins",
    "export": "flexmoe.conversion.export",
    "import_flex_olmo": "flexmoe.conversion.import_flex_olmo",
    "compress": "flexmoe.conversion.low_rank",
    "densify": "flexmoe.conversion.low_rank",
    "evaluate": "flexmoe.evaluation",
    "graft": "flexmoe.grafting",
    "CapturedForward": "flexmoe.graphs",
    "inspect": "flexmoe.inspection",
    "expert_lora_config": "flexmoe.peft",
    "Plan": "flexmoe.planning",
    "plan": "flexmoe.planning",
    "keygen": "flexmoe.signing",
    "pull": "flexmoe.sharing",
    "push": "flexmoe.sharing",
    "sign": "flexmoe.signing",
    "TrainingSettings": "flexmoe.training",
    "train_expert": "flexmoe.training",
    "Verdict": "flexmoe.admission",
    "verify": "flexmoe.admission",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flexmoe' has no attribute {name!r}")


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
