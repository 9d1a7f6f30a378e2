"""What importing brings in: `import flexmoe` next to nothing, the model only what transformers brings itself.

The seconds that this saves are measured by `tests/bench/bench_import.py`.
"""

import json
import subprocess
import sys

ADDED = """
import json, sys
{first}
before = set(sys.modules)
{then}
print(json.dumps(sorted(set(sys.modules) - before)))
"""

# Of the project's dependencies, what a model needs no part of: data, training, tables, plots, the command line.
NOT_FOR_A_MODEL = {
    "datasets",
    "evaluate",
    "flexmoe_cli",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "rich",
    "sklearn",
    "typer",
}


def added(first: str, then: str) -> list[str]:
    """The modules that `then` brings in after `first`, in a fresh process."""
    command = [sys.executable, "-c", ADDED.format(first=first, then=then)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_import_flexmoe_brings_in_its_configuration_alone():
    assert added("import transformers; from transformers import AutoModelForCausalLM", "import flexmoe") == [
        "flexmoe",
        "flexmoe.modeling",
        "flexmoe.modeling.cards_flexmoe",  # the standard library only: templates are told of here, and read when used
        "flexmoe.modeling.configuration_flexmoe",
        "flexmoe.registration",
    ]


def test_the_model_brings_in_nothing_that_only_training_needs():
    # the library's own classes first: up to 5.17 they bring in scikit-learn, where it is installed
    modules = added(
        "from transformers import GenerationMixin, PreTrainedModel", "import flexmoe; flexmoe.FlexMoeForCausalLM"
    )
    assert "flexmoe.modeling.modeling_flexmoe" in modules
    assert not NOT_FOR_A_MODEL & {name.partition(".")[0] for name in modules}
