"""Add an expert to a model and remove it again. The result is, bit for bit, the model that never had it.

    python examples/add_and_remove.py

On the command line: `flexmoe add MODEL PACKAGE --out NEW` and `flexmoe remove MODEL NAME --out NEW`.
"""

import tempfile
from pathlib import Path

import torch
from tiny_anchor import tiny_anchor
from transformers import AutoModelForCausalLM

import flexmoe


def package_of_an_owner(grafted: Path, folder: Path) -> Path:
    """An expert package as an owner publishes it; examples/train_an_expert.py trains one."""
    model = AutoModelForCausalLM.from_pretrained(grafted)
    model.add_expert_copy("math")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".math." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.save_expert("math", folder, license="cc-by-4.0", data_statement="Worked problems.")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grafted = flexmoe.graft(tiny_anchor(folder / "anchor"), folder / "grafted")
        package = package_of_an_owner(grafted, folder / "math-expert")

        model = AutoModelForCausalLM.from_pretrained(grafted)
        inputs = torch.tensor([[5, 6, 7, 8]])
        before = model(inputs).logits

        # A folder or a Hub id. Its hashes, its anchor, its shapes and its router rows are checked first.
        name = model.add_expert(package)
        print("with", name, "->", model.expert_names)
        assert not torch.equal(model(inputs).logits, before)

        # The expert's tensors are deleted. No other tensor depends on them.
        model.remove_expert(name)
        print("without", name, "->", model.expert_names)
        assert torch.equal(model(inputs).logits, before)

        # The same on disk: the files are equal too.
        composed = flexmoe.compose(grafted, [package], folder / "composed")
        flexmoe.remove(composed, "math", folder / "removed")
        never = AutoModelForCausalLM.from_pretrained(folder / "removed")
        assert torch.equal(never(inputs).logits, before)
        print("removed equals never added: yes")


if __name__ == "__main__":
    main()
