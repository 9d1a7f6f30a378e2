"""The modules that `import flexmoe` loads: its configuration only; and those that using a model loads.

`benchmarks/bench_import.py` measures the time.
"""

import json
import rlcompleter
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
added, scope = {{}}, {{}}
for name, statement in {statements!r}.items():
    before = set(sys.modules)
    exec(statement, scope)
    added[name] = sorted(set(sys.modules) - before)
print(json.dumps(added))
"""

STATEMENTS = {
    "transformers": "import transformers; from transformers import AutoModelForCausalLM",
    "flexmoe": "import flexmoe",
    # transformers' classes before the model's, because versions up to 5.17 import scikit-learn
    "classes": "from transformers import GenerationMixin, PreTrainedModel",
    "model": "flexmoe.FlexMoeForCausalLM",
}

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


@pytest.fixture(scope="module")
def added() -> dict[str, list[str]]:
    """The modules that each statement of `STATEMENTS` imports, one after another in a new process."""
    command = [sys.executable, "-c", PROGRAM.format(statements=STATEMENTS)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_import_flexmoe_imports_only_the_configuration(added):
    assert added["flexmoe"] == [
        "flexmoe",
        "flexmoe.io",
        "flexmoe.io.package_config",
        "flexmoe.modeling",
        "flexmoe.modeling.configuration_flexmoe",
        "flexmoe.registration",
    ]


def test_model_does_not_import_training_dependencies(added):
    assert "flexmoe.modeling.modeling_flexmoe" in added["model"]
    assert not NOT_FOR_A_MODEL & {name.partition(".")[0] for name in added["model"]}


def test_lazy_names_are_listed_and_completed():
    import flexmoe

    listed = dir(flexmoe)
    assert [name for name in listed if not name.startswith("_")] == sorted(flexmoe.__all__)
    assert {"__version__", "__all__", "__doc__"} <= set(listed)
    matches = rlcompleter.Completer({"flexmoe": flexmoe}).attr_matches("flexmoe.tr")
    assert [match.rstrip("(") for match in matches] == ["flexmoe.track_usage", "flexmoe.train_expert"]
