"""Train a LoRA adapter on one expert with PEFT, merge it, and save the expert as a package.

pip install 'flexmoe[peft]'
python examples/peft_on_one_expert.py
"""

import tempfile
from pathlib import Path

import peft
import torch
from tiny_anchor import tiny_anchor
from transformers import AutoModelForCausalLM

import flexmoe


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = AutoModelForCausalLM.from_pretrained(flexmoe.graft(tiny_anchor(folder / "anchor"), folder / "grafted"))
        model.add_expert_copy("math")
        model.add_expert_copy("code")
        others = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".math." not in name}

        # Every matrix of "math" and no other: no router row, no attention, no other owner's expert.
        config = flexmoe.expert_lora_config(model, "math", r=4, lora_alpha=8)
        adapted = peft.get_peft_model(model, config)
        adapted.print_trainable_parameters()

        # Any training loop works, transformers' Trainer included.
        optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
        batch = torch.randint(3, 40, (4, 16), generator=torch.Generator().manual_seed(0))
        for step in range(5):
            loss = adapted(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.3f}")

        adapted.save_pretrained(folder / "math-adapter")  # the adapter alone

        # Or merged: an expert package like any other. The other experts keep every bit.
        merged = adapted.merge_and_unload()
        merged.save_expert("math", folder / "math-expert")
        state = merged.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in others.items())
        print("saved", flexmoe.ExpertPackage.open(folder / "math-expert").manifest.name)


if __name__ == "__main__":
    main()
