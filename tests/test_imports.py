"""The modules that `import flexmoe` loads: its configuration only; and those that using a model loads.

`benchmarks/bench_import.py` measures the time.
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

# Dependencies that a model does not need: for data, training, tables, plots and the command line.
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
    """The modules that `then` imports after `first`, in a new process."""
    command = [sys.executable, "-c", ADDED.format(first=first, then=then)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_import_flexmoe_imports_only_the_configuration():
    assert added("import transformers; from transformers import AutoModelForCausalLM", "import flexmoe") == [
        "flexmoe",
        "flexmoe.modeling",
        "flexmoe.modeling.configuration_flexmoe",
        "flexmoe.registration",
    ]


def test_model_does_not_import_training_dependencies():
    # transformers' classes first, because versions up to 5.17 import scikit-learn
    modules = added(
        "from transformers import GenerationMixin, PreTrainedModel", "import flexmoe; flexmoe.FlexMoeForCausalLM"
    )
    assert "flexmoe.modeling.modeling_flexmoe" in modules
    assert not NOT_FOR_A_MODEL & {name.partition(".")[0] for name in modules}
