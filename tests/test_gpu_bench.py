"""The benchmark of the kernels, as far as a CPU can run it: a tiny run, verdicts, the layout, steps, the docs.

The figures come from a GPU: `benchmarks/on_gpu.py`.
"""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.soak import soak

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def folder_of_benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The result of a run with a small model."""
    import bench_kernels

    out = tmp_path_factory.mktemp("bench") / "new" / "routing.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_kernels.py", "--tiny", "--out", str(out)])
        bench_kernels.main()
    return json.loads(out.read_text())


def test_a_tiny_run_has_all_parts(result):
    assert result["complete"]
    assert result["failed"] == {}
    assert {"device", "capability", "date", "versions", "shapes", "ceilings", "auto"} <= set(result)
    assert all(far["passed"] and far["same_bits_again"] for far in result["correctness"].values())
    assert [row["case"] for row in result["rows"][:4]] == [
        "route, 1 token", "route, 8 tokens", "route, 64 tokens", "block, 1 token",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["errors"] == {}
        assert row["microseconds"] > 0
        assert row["floor_us"] > 0
        assert {t["speed_over"] for t in row["thresholds"] if "speed_over" in t} <= set(row["others"])
        assert row["path"]
    assert {"grouped_mm", "eager", "batched_mm", "cuBLAS loop"} <= set(result["rows"][3]["others"])
    assert set(result["sweep"]) == {"torch.bfloat16", "torch.float16", "torch.float32"}
    assert all(figures["distance"] < 1e-2 for counts in result["sweep"].values() for figures in counts.values())
    assert [row["case"] for row in result["rows"][-3:]] == [
        f"low_rank, {n}" for n in ("1 token", "8 tokens", "64 tokens")
    ]
    assert len(result["decode"]) == 16
    assert not any("error" in figures for figures in result["decode"].values())


def test_a_tiny_run_asserts_nothing_and_needs_an_output_file(result, monkeypatch, capsys):
    import bench_kernels

    if not torch.cuda.is_available():
        assert {row["passed"] for row in result["rows"]} == {None}
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--tiny"])
    with pytest.raises(SystemExit):
        bench_kernels.main()
    assert "give --out" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_warm_compiles_for_each_number_of_tokens(dtype, monkeypatch, capsys):
    import bench_kernels

    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--tiny", "--warm", dtype])
    bench_kernels.main()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"compiled for {tokens} tokens of torch.{dtype}" for tokens in (1, 2, 3, 65)]


@pytest.mark.parametrize("program", ["bench_kernels", "on_gpu"])
def test_without_a_gpu_nothing_is_written(program, monkeypatch, capsys, tmp_path):
    module = __import__(program)
    monkeypatch.setattr(module, "on_gpu" if program == "bench_kernels" else "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", [program, "--out", str(tmp_path / "out")])
    assert not module.main()
    output = capsys.readouterr().out
    assert "needs a GPU" in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def row_of(case, microseconds, **ratios):
    return {
        "case": case.name,
        "kind": case.kind,
        "tokens": case.tokens,
        "microseconds": microseconds,
        "floor_us": 300.0,
        "share_of_floor": 300.0 / microseconds,
        "others": {name: {"ratio": ratio, "microseconds": ratio * microseconds} for name, ratio in ratios.items()},
    }


VERDICTS = [
    # device, capability, microseconds, grouped_mm, batched_mm, eager, passed
    ("NVIDIA H200", (9, 0), 379.0, 1.3, 2.4, 1.8, True),
    ("NVIDIA H200", (9, 0), 381.0, 1.3, 2.4, 1.8, False),
    ("NVIDIA H200", (9, 0), 379.0, 1.29, 2.4, 1.8, False),
    ("NVIDIA H200", (9, 0), 379.0, 1.3, 2.39, 1.8, False),
    ("NVIDIA H200", (9, 0), 379.0, 1.3, 2.4, 1.79, False),
    ("NVIDIA H100 80GB HBM3", (9, 0), 500.0, 1.3, 2.4, 1.8, True),
    ("NVIDIA H100 80GB HBM3", (9, 0), 500.0, 1.0, 2.4, 1.8, False),
    ("NVIDIA A100", (8, 0), 9000.0, 0.1, 0.1, 0.1, None),
]


@pytest.mark.parametrize(("device", "capability", "microseconds", "grouped", "batched", "eager", "passed"), VERDICTS)
def test_verdicts(device, capability, microseconds, grouped, batched, eager, passed):
    from bench_kernels import CASES
    from kernel_verdicts import missed, with_verdict

    case = next(case for case in CASES if case.name == "block, 1 token")
    row = row_of(case, microseconds, grouped_mm=grouped, batched_mm=batched, eager=eager)
    verdict = with_verdict(row, case, device, capability)
    assert verdict["passed"] is passed
    fine = {"correctness": {"1": {"passed": True}}, "rows": [], "failed": {}}
    assert missed({**fine, "rows": [verdict]}) == (["block, 1 token"] if passed is False else [])
    assert missed({**fine, "correctness": {"1": {"passed": False}}}) == ["wrong with 1 tokens"]
    assert missed({**fine, "failed": {"route, 8 tokens": "RuntimeError: no"}}) == ["route, 8 tokens"]


def test_a_kernel_that_fails_is_reported_and_the_rest_runs(tmp_path, monkeypatch):
    import bench_kernels
    import kernel_contenders
    import kernel_route
    from kernel_contenders import TINY

    from flexmoe.kernels import layer

    route = kernel_route.op.route

    def fails(x_TH, *args):
        if len(x_TH) == 8:
            raise RuntimeError("no such kernel\nand much more")
        return route(x_TH, *args)

    for module in (kernel_route.op, kernel_contenders, layer):
        monkeypatch.setattr(module, "route", fails)
    counts = {"checked": (8, 3), "cases": (8,), "sweep": (1,)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        result = bench_kernels.measure(TINY, device, tmp_path / "routing.json", counts)
    assert result["correctness"]["8"] == {"error": "RuntimeError: no such kernel", "passed": False}
    assert result["failed"]["route, 8 tokens"] == "RuntimeError: no such kernel"
    assert set(bench_kernels.missed(result)) >= {"wrong with 8 tokens", "route, 8 tokens", "block, 8 tokens"}
    assert [row["case"] for row in result["rows"]] == ["route, 1 token", "block, 1 token", "low_rank, 1 token"]
    assert result["complete"]


def test_a_contender_without_a_figure_misses_its_threshold():
    from bench_kernels import CASES
    from kernel_verdicts import with_verdict

    case = next(case for case in CASES if case.name == "block, 1 token")
    assert with_verdict(row_of(case, 1.0, grouped_mm=9.0, eager=9.0), case, "NVIDIA H200", (9, 0))["passed"] is False


@pytest.mark.parametrize(("grouped", "loop", "passed"), [(1.1, 1.0, True), (0.9, 1.5, False), (1.5, 0.99, False)])
def test_many_tokens_are_compared_with_the_best_and_their_goal_is_not_asserted(grouped, loop, passed):
    from bench_kernels import CASES
    from kernel_verdicts import with_verdict

    case = next(case for case in CASES if case.name == "block, 4096 tokens")
    row = with_verdict(row_of(case, 9000.0, grouped_mm=grouped, **{"cuBLAS loop": loop}), case, "NVIDIA H200", (9, 0))
    assert row["passed"] is passed
    assert [threshold["met"] for threshold in row["thresholds"]] == [passed, False]


def test_auto_uses_the_longest_range():
    from kernel_verdicts import entry, ranges

    ratios = {"1": 2.0, "2": 0.9, "4": 0.95, "8": 1.0, "16": 0.94, "32": 3.0}
    sweep = {"torch.bfloat16": {n: {"ratio": r} for n, r in ratios.items()}, "torch.float32": {"1": {"ratio": 0.5}}}
    assert ranges(sweep) == {"torch.bfloat16": (4, 8), "torch.float32": None}
    line = entry(ranges(sweep), (9, 0))
    assert line == "(9, 0): {torch.bfloat16: (4, 8)},"
    assert eval(f"{{{line}}}") == {(9, 0): {torch.bfloat16: (4, 8)}}


WITHOUT = """
import sys
MISSING = {"rich", "typer", "datasets", "evaluate", "jsonschema", "jinja2", "peft", "accelerate", "torchao"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        return None if name.split(".")[0] in MISSING else self.finder.find_spec(name, *args)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
IMPORTS = """
import flexmoe, flexmoe.modeling, flexmoe.testing, flexmoe.kernels.graphs
from flexmoe.modeling import FlexMoeForCausalLM
import tests.kernels.experts.inputs, tests.kernels.route.inputs, bench_kernels, every_kernel
print(flexmoe.__file__)
"""
WITHOUT_RICH = """
try:
    import rich
except ImportError:
    print(flexmoe.__version__)
"""


@pytest.mark.parametrize("imports", ["import flexmoe; print(flexmoe.__file__)", soak(IMPORTS)], ids=["one", "all"])
def test_the_layout_needs_no_install_and_little_else(imports, tmp_path):
    import on_gpu

    environment = {**on_gpu.layout(tmp_path / "package"), "TRITON_INTERPRET": "1"}
    (tmp_path / "package" / "sitecustomize.py").write_text(WITHOUT)
    environment["PYTHONPATH"] += f":{ROOT / 'benchmarks'}"
    command = [sys.executable, "-c", imports + WITHOUT_RICH]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(tmp_path / "package" / "flexmoe" / "__init__.py"), "0.1.0"]


def test_the_files_of_all_steps_exist(tmp_path, monkeypatch):
    import on_gpu

    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: f"/installed/{name}")
    steps = on_gpu.steps(tmp_path, tiny=False)
    for step in steps:
        files = [word for word in map(str, step.command) if word.endswith(".py")]
        assert all((ROOT / word.removeprefix("--ignore=")).is_file() for word in files), step.name
    assert [step.seconds is None for step in steps] == [False] * (len(steps) - 1) + [True]
    assert sum(step.seconds or 0 for step in steps) < 60 * on_gpu.MINUTES
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    assert [step.name for step in on_gpu.steps(tmp_path, tiny=False) if step.command is None] == [
        "memcheck",
        "racecheck",
    ]


@pytest.mark.parametrize(
    ("code", "verdict", "last"),
    [
        ("print('all is well')", "passed", "all is well"),
        ("print('no'); raise SystemExit(3)", "failed (3)", "no"),
        ("print('slow', flush=True); import time; time.sleep(60)", "timed out", "slow"),
        (None, "not installed", ""),
    ],
)
def test_a_step_ends(code, verdict, last, tmp_path, capsys):
    import on_gpu

    step = on_gpu.Step("a step", code and [sys.executable, "-S", "-c", code])
    start = time.monotonic()
    ran = on_gpu.run(step, {}, tmp_path / "log", 1.0 if verdict == "timed out" else 30.0)
    assert (ran.verdict, ran.last_line) == (verdict, last)
    assert time.monotonic() - start < 20
    assert verdict in on_gpu.table([ran])
    assert last in capsys.readouterr().out


def test_the_docs_have_a_table_of_a_measured_run_and_nothing_before(tmp_path, result):
    from bench_kernels import CASES
    from kernel_verdicts import with_verdict
    from readme_figures import _routing
    from readme_plots import ROUTING_PLOT, plot_routing_speed

    path = tmp_path / "routing.json"
    assert _routing(path) == ""
    ratios = {"torch op sequence": 5.0, "grouped_mm": 1.25, "batched_mm": 2.5, "eager": 1.9, "cuBLAS loop": 1.0}
    rows = [
        with_verdict(row_of(case, 350.0 if case.tokens < 512 else 8700.0, **ratios), case, "H200", (9, 0))
        for case in CASES
    ]
    path.write_text(json.dumps({**result, "device": "NVIDIA H200", "rows": rows}))
    text = _routing(path)
    assert text.startswith("On NVIDIA H200 (20")
    assert (
        "| block, 1 token | 350 µs | 300 µs | 86% | 1.25x grouped_mm (≥ 1.3x), missed; 2.50x batched_mm (≥ 2.4x); "
        "1.90x eager (≥ 1.8x); ≤ 380 µs |\n"
    ) in text
    assert "| block, 512 tokens | 8.70 ms | 300 µs | 3% | none |\n" in text
    assert f"]({ROUTING_PLOT})\n" in text
    assert "Failed" not in text
    broken = {"failed": {"route, 8 tokens": "no"}, "correctness": {"1": {"passed": True}, "64": {"passed": False}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **broken}))
    assert "\nFailed: 64 tokens (wrong).\nFailed: route, 8 tokens.\n" in _routing(path)
    plot_routing_speed(path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


LAUNCHES = {
    ("experts.decode_kernel", "gate_up_launch"): (2, 1, True),
    ("experts.decode_kernel", "down_launch"): (2, 1, 4096, 132),
    ("experts.prefill_kernel", "gate_up_launch"): (2, 2925.0, True, 227 << 10),
    ("experts.prefill_kernel", "down_launch"): (2, 2925.0, 227 << 10),
    ("route.kernel", "few_launch"): (7, torch.float32),
    ("route.kernel", "many_launch"): (7, torch.float32, 4096),
}


def test_tuned_constants_are_constants_of_launches():
    pytest.importorskip("triton")
    import kernel_tuning

    assert {(tuned.module, tuned.launch) for tuned in kernel_tuning.LAUNCHES} == set(LAUNCHES)
    for tuned in kernel_tuning.LAUNCHES:
        module = importlib.import_module(f"flexmoe.kernels.{tuned.module}")
        arguments = LAUNCHES[tuned.module, tuned.launch]
        own = getattr(module, tuned.launch)(*arguments)
        assert set(tuned.options) <= set(own)
        for variant in tuned.variants():
            with kernel_tuning.changed(tuned, variant):
                assert getattr(module, tuned.launch)(*arguments) == {**own, **variant}
        assert getattr(module, tuned.launch)(*arguments) == own


def test_tuning_prints_the_best_and_the_excluded(monkeypatch, capsys):
    import kernel_tuning
    from gpu_clock import Timed

    pytest.importorskip("triton")
    tuned = kernel_tuning.Tuned("route.kernel", "few_launch", (1,), {"num_warps": (4, 8, 16)})
    times = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(kernel_tuning, "by_replay", lambda calls, seconds: Timed(next(times), 0.0, "graph"))
    outputs = iter([1.0, 1.0, 1.5, 1.0])
    kernel_tuning.print_best(tuned, 1, lambda: torch.full((2,), next(outputs)))
    assert capsys.readouterr().out.splitlines() == [
        "route.kernel.few_launch, 1 tokens: current 3.00 us",
        "         2.00 us  num_warps 4",
        "         3.00 us  current",
        "         4.00 us  num_warps 16",
        "    excluded: num_warps 8: wrong by 0.5",
    ]
