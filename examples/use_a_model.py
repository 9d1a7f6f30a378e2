"""Load a FlexMoE model, generate with some of its experts, and see which expert handled which share of the tokens.

python examples/use_a_model.py
"""

import tempfile
from pathlib import Path

from tiny_anchor import tiny_anchor
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexmoe  # registers the model with the Auto classes


def build(folder: Path) -> Path:
    """A grafted model with two more experts. `flexmoe compose` builds one from packages instead."""
    grafted = flexmoe.graft(tiny_anchor(folder / "anchor"), folder / "grafted")
    model = AutoModelForCausalLM.from_pretrained(grafted)
    for name in ("math", "code"):
        model.add_expert_copy(name)  # starts as a copy of the public expert
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(grafted).save_pretrained(folder / "model")
    return folder / "model"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = build(Path(temporary))
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        print("experts:", model.expert_names)

        # One call: only these experts take part.
        prompts = tokenizer(["find x: x + 1 = 2", "the river rose."], return_tensors="pt", padding=True)
        generated = model.generate(**prompts, experts=["public", "math"], max_new_tokens=8)
        print("public and math:", tokenizer.batch_decode(generated, skip_special_tokens=True))

        # One set of experts per sequence of the batch.
        model.generate(**prompts, experts=[["math"], ["public", "code"]], max_new_tokens=8)

        # A block of code, in this thread or task only.
        with model.only_experts("public"):
            anchor_logits = model(**prompts).logits
        print("logits of the anchor:", tuple(anchor_logits.shape))

        # Until further notice; `save_pretrained` stores it in the config.
        model.set_active_experts(["public", "math"])
        print("active:", model.active_experts)
        model.set_active_experts(None)

        # Totals per expert, not per token: routing decisions would reveal the text.
        with flexmoe.track_usage(model) as usage:
            model(**prompts)
        print("share of the routing weight:", {name: round(share, 3) for name, share in usage.share().items()})


if __name__ == "__main__":
    main()
