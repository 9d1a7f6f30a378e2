"""Publish an expert on the Hub, build a model that refers to it, and withdraw the expert again.

    hf auth login
    python examples/publish_and_withdraw.py --namespace YOUR-NAME

It creates the repository NAMESPACE/flexmoe-example-expert and deletes it at the end. `HF_ENDPOINT` selects another Hub
than huggingface.co, as for any program that uses `huggingface_hub`.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from tiny_anchor import tiny_anchor
from transformers import AutoModelForCausalLM

import flexmoe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--namespace", required=True, help="your user name or organization on the Hub")
    repository = f"{parser.parse_args().namespace}/flexmoe-example-expert"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        anchor = tiny_anchor(folder / "anchor")
        grafted = flexmoe.graft(anchor, folder / "grafted")
        model = AutoModelForCausalLM.from_pretrained(grafted)
        model.add_expert_copy("math")
        package = model.save_expert("math", folder / "math-expert", license="cc0-1.0")

        # The owner publishes. Files are checked, scanned for private text, and pushed in one commit.
        flexmoe.push(package, repository)
        try:
            # Anyone composes a model by reference: it names the anchor and the package, and holds no weights.
            composition = flexmoe.compose_by_reference(grafted, [repository], folder / "composition", anchor=anchor)
            print("loaded:", AutoModelForCausalLM.from_pretrained(composition).expert_names)
        finally:
            # The owner withdraws.
            HfApi().delete_repo(repository)

        # Every load asks the Hub whether the expert is still offered, even if all its files are in the cache.
        try:
            AutoModelForCausalLM.from_pretrained(composition)
        except FileNotFoundError as error:
            print("withdrawn:", str(error).splitlines()[0])
        remaining = AutoModelForCausalLM.from_pretrained(composition, missing_experts="skip")
        print("loaded without it:", remaining.expert_names)
        assert "math" not in remaining.expert_names


if __name__ == "__main__":
    main()
