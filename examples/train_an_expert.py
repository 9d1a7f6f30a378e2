"""Train an expert on one owner's text, compose it with the grafted anchor, and measure what it gained.

    python examples/train_an_expert.py

On the command line: `flexmoe graft`, `flexmoe train`, `flexmoe compose` and `flexmoe evaluate`.
"""

import tempfile
from pathlib import Path

from tiny_anchor import tiny_anchor, write_texts

import flexmoe


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        public, problems = write_texts(folder)

        # Once, by anyone: the anchor's feed-forward networks become the expert "public". A sample of public text is
        # stored with the model; every owner fits a router row against it.
        grafted = flexmoe.graft(tiny_anchor(folder / "anchor"), folder / "grafted", public_data=[public])

        # By the owner, where the data is. Only the package leaves. Settings that are not given follow from the
        # anchor, the text and the machine (docs/training.md).
        package = flexmoe.train_expert(
            grafted,
            "math",
            [problems],
            folder / "math-expert",
            license="cc-by-4.0",
            data_statement="Worked problems, written for this example.",
            progress=False,
        )
        manifest = flexmoe.ExpertPackage.open(package).manifest
        print("package:", manifest.name, manifest.license, manifest.kind)

        # By anyone who has the packages: no joint training.
        model = flexmoe.compose(grafted, [package], folder / "model")
        data = {"public": [public], "math": [problems]}
        before, after = (flexmoe.evaluate(path, data, sequence_length=32) for path in (grafted, model))
        for domain in data:
            print(f"loss on {domain} text: {before[domain].loss:.3f} -> {after[domain].loss:.3f}")
        assert after["math"].loss < before["math"].loss


if __name__ == "__main__":
    main()
