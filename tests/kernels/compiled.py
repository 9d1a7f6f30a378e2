"""Compiles the kernels for GPUs that need not be present, and checks their machine code against requirements.

    python -m tests.kernels.compiled --arch 90 --quick     # prints JSON: {case: measurements}

It has to run without TRITON_INTERPRET, so tests start it as a separate process (`measured`). Each operator has its
cases in a module with a tuple `CASES`, which takes constexprs and options from the function that the launcher takes
them from, so the checked kernel is the launched one. Does not cover whether a kernel is correct, or how fast it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("route.cases", "experts.cases_decode", "experts.cases_prefill", "low_rank.cases")
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may use


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched for one dtype and one class of shapes, and the requirements on its machine code.

    Attributes:
        name: operator, kernel, dtype and so on: "route.few.bf16".
        kernel: module in flexmoe.kernels and function: "route.kernel.route_few".
        signature: Triton's type of each argument that is not a constexpr, in order: {"x": "*bf16", "T": "i32"}.
        launch: the keyword arguments of the launch, constexprs and options, from the launcher's own function.
        aligned: arguments that are multiples of 16 (numbers), or aligned to 16 bytes (pointers).
        gpus: compute capabilities on which it is launched like this.
        quick: whether `make test` compiles it, for one GPU, as one of the few that take a second at most; the soak
            test compiles all for all.
        max_registers: per thread.
        max_stack: bytes per thread that may be spilled, outside of loops.
        wide_share: the least share of the bytes in its load instructions that are loaded 16 at a time.
        products: the instruction of its matrix products by GPU: {80: "mma.sync", 90: "wgmma"}.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    launch: Mapping[str, Any]
    aligned: Sequence[str] = ()
    gpus: Sequence[int] = tuple(SHARED_MEMORY)
    quick: bool = False
    max_registers: int = 255
    max_stack: int = 0
    wide_share: float = 0.0
    products: Mapping[int, str] = field(default_factory=dict)

    def failures(self, arch: int, found: Mapping[str, Any]) -> list[str]:
        """The requirements that the measurements violate, in words."""
        wide = found["loads"].get("16", 0) * 16 / max(1, sum(int(w) * n for w, n in found["loads"].items()))
        product = self.products.get(arch)
        broken = {
            f"{found['stack']} bytes of stack: registers are spilled": found["stack"] > self.max_stack,
            f"{found['registers']} registers, at most {self.max_registers}": found["registers"] > self.max_registers,
            f"{found['shared']} bytes of shared memory": found["shared"] > SHARED_MEMORY[arch],
            f"{wide:.0%} of the bytes are loaded 16 at a time, loads are {found['loads']}": wide < self.wide_share,
            f"no {product}, products are {found['products']}": product is not None
            and product not in found["products"],
        }
        return [words for words, is_broken in broken.items() if is_broken]


def cases() -> list[Case]:
    """Those of all operators."""
    return [case for name in MODULES for case in importlib.import_module(f"tests.kernels.{name}").CASES]


def measured(arch: int, quick: bool) -> dict[str, dict[str, Any]]:
    """The output of this program: by name of the case, the measurements, and the requirements that they violate."""
    command = [sys.executable, "-m", "tests.kernels.compiled", f"--arch={arch}", *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return json.loads(ran.stdout)


def measure(case: Case, arch: int) -> dict[str, Any]:
    """Registers, bytes of stack and of shared memory, counts of loads by width in bytes, instructions of products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = case.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(f"flexmoe.kernels.{module}"), function)
    options = {name: value for name, value in case.launch.items() if name in OPTIONS}
    constexprs = {name: value for name, value in case.launch.items() if name not in OPTIONS}
    unknown = {*case.signature, *constexprs} ^ set(kernel.arg_names)
    if unknown:
        raise TypeError(f"{case.name}: {sorted(unknown)} are in the case or in {case.kernel}, not in both.")
    types = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(kernel, types, constexprs, attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        **_resources(binary.asm["cubin"]),
        "shared": binary.metadata.shared,
        "loads": _loads(binary.asm["ptx"]),
        "products": sorted(set(re.findall(r"\b(wgmma|mma\.sync)", binary.asm["ptx"]))),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    return {"registers": int(used["REG"]), "stack": int(used["STACK"])}


def _loads(ptx: str) -> dict[str, int]:
    """The number of instructions that load 1, 2, 4, 8 or 16 bytes from global memory, tables and scalars included."""
    widths: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[bufs](\d+)\s", ptx):
        widths[int(vector or 1) * int(bits) // 8] += 1
    widths.update(int(width, 0) for width in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)", ptx))
    return {str(width): count for width, count in sorted(widths.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, required=True, help="compute capability: 80, 90")
    parser.add_argument("--quick", action="store_true", help="only the cases that `make test` compiles")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    here = [case for case in cases() if arguments.arch in case.gpus]
    chosen = [case for case in here if (case.quick or not arguments.quick) and arguments.only in case.name]
    found = {case.name: measure(case, arguments.arch) for case in chosen}
    # checked here, because launches differ in the interpreter, which is on in the tests
    broken = {case.name: case.failures(arguments.arch, found[case.name]) for case in chosen}
    json.dump({name: {**values, "broken": broken[name]} for name, values in found.items()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
