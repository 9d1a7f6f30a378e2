"""Human-readable results: contents of folders, written files, scores, plans.

Does not cover the demo's tables (`flexmoe.demo.report`), or colours and JSON (`output`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from flexmoe_cli.output import human_bytes, human_count, print_json, print_line, print_table, show_warning

if TYPE_CHECKING:
    from flexmoe.conversion.low_rank import CompressedLayer
    from flexmoe.evaluation import DomainScore
    from flexmoe.planning.plan import Plan, Training


_IMPLEMENTATIONS = {"torch": "PyTorch modules", "triton": "fused kernels"}
_CONTENTS = {
    "package": "holds the expert",
    "model": "holds a model with the experts",
    "composition": "references the parts of a model with the experts",
}


def show_result(folder: Path, as_json: bool, hint: str | None = None) -> None:
    """Shows what a command has written: one line and a hint, or with `as_json` the output of `inspect`."""
    from flexmoe.inspection import inspect

    found = inspect(folder)
    if as_json:
        print_json(found)
        return
    names = ", ".join(expert["name"] for expert in found["experts"])
    size = "" if found["bytes"] is None else f" ({human_bytes(found['bytes'])})"
    print_line(f"[bold]{escape(str(folder))}[/] {_CONTENTS[found['kind']]} {names}{size}.")
    if inactive := [expert["name"] for expert in found["experts"] if not expert["active"]]:
        print_line(
            f"Note: {', '.join(inactive)} will be inactive: the model has a choice of active experts, made with "
            "set_active_experts. To activate all experts, load it, call set_active_experts(None), and save it."
        )
    if hint:
        print_line(escape(hint))


def show_trained(package: Path, as_json: bool, hint: str) -> None:
    """As `show_result`; the last line shows the validation losses before and after training."""
    show_result(package, as_json, hint)
    if not as_json:
        from flexmoe.inspection import inspect
        from flexmoe.training.messages import losses

        print_line(escape(losses(inspect(package)["experts"][0]["training"])))


def show_composed(folder: Path, as_json: bool, hint: str | None = None) -> None:
    """As `show_result`, with warnings on stderr about licences that conflict."""
    from flexmoe.card_files import license_conflicts

    show_result(folder, as_json, hint)
    for conflict in license_conflicts(folder):
        show_warning(conflict, UserWarning, "", 0)


def show_export(folder: Path, as_json: bool, losses: Mapping[str, tuple[float, float]] | None = None) -> None:
    """Shows what an export has written and how to load it; `losses` by domain: of the model, of the export."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "path": str(folder),
        "model_type": config["model_type"],
        "architecture": config["architectures"][0],
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    if losses is not None:
        found["losses"] = {domain: {"model": one, "export": other} for domain, (one, other) in losses.items()}
    if as_json:
        print_json(found)
        return
    size = human_bytes(found["bytes"])
    print_line(f"[bold]{escape(str(folder))}[/] holds a {found['architecture']} ({size}).")
    print_line(escape(f'It loads without FlexMoE: AutoModelForCausalLM.from_pretrained("{folder}")'))
    if losses is not None:
        rows = [[name, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] for name, (a, b) in losses.items()]
        print_table("Loss per token", ("domain", "model", "export", "change"), rows)


def show_import(folder: Path, names: Sequence[str], as_json: bool) -> None:
    """Shows what an import has written, the model first, and how to compose the parts."""
    from flexmoe.conversion.import_flex_olmo import MODEL_FOLDER
    from flexmoe.inspection import inspect

    parts = [folder / MODEL_FOLDER, *(folder / name for name in names[1:])]
    if as_json:
        model, *packages = map(inspect, parts)
        print_json({"path": str(folder), "model": model, "packages": packages})
        return
    for part in parts:
        show_result(part, as_json=False)
    if len(parts) > 1:
        print_line(escape(f"Compose them again with: flexmoe compose {' '.join(map(str, parts))} --out FOLDER"))


def show_compression(folder: Path, layers: Sequence[CompressedLayer], as_json: bool) -> None:
    """Shows a compressed expert: rank and error of each layer, and the size of the package."""
    if as_json:
        from flexmoe.inspection import inspect

        print_json({**inspect(folder), "layers_kept": [asdict(layer) for layer in layers]})
        return
    rows = [[str(layer.layer), str(layer.rank), f"{layer.error:.3g}"] for layer in layers]
    print_table("Compressed", ("layer", "rank", "relative error"), rows)
    show_result(folder, as_json=False)


def show_inspection(found: Mapping[str, Any]) -> None:
    """Shows the output of `flexmoe.inspection.inspect`: a few lines and a table of the experts."""
    for label, value in _facts(found).items():
        if value is not None:
            print_line(f"[bold]{label:<18}[/] {escape(str(value))}")
    columns = (
        "expert",
        "kind",
        "params",
        "size",
        "row norm",
        "bias",
        "from",
        "commit",
        "license",
        "version",
        "active",
    )
    print_table("Experts", columns, [_expert_row(expert, found["kind"]) for expert in found["experts"]])


def show_scores(model: str, scores: Mapping[str, DomainScore]) -> None:
    """Shows a table of the domains, with the unweighted mean of their losses if there are several."""
    rows = [
        [name, f"{score.loss:.4f}", f"{score.perplexity:.2f}", str(score.tokens), str(score.documents)]
        for name, score in scores.items()
    ]
    if len(scores) > 1:
        rows.append(["mean", f"{sum(score.loss for score in scores.values()) / len(scores):.4f}", "", "", ""])
    print_table(str(model), ("domain", "loss", "perplexity", "tokens", "documents"), rows)


def show_plan(plan: Plan) -> None:
    """Shows the costs of a FlexMoE model: tables for the model, one owner, and serving."""
    kind = "full experts" if plan.rank is None else f"low-rank experts of rank {plan.rank}"
    gpu = plan.gpu
    facts = {
        "anchor": f"{plan.anchor} ({plan.model_type}, {plan.layers} layers)",
        "experts": f"{plan.experts} with public, {plan.k} per token; {kind}",
        "GPU": f"{gpu.name}: {gpu.tflops:g} TFLOP/s bfloat16, {gpu.memory_gb:g} GB, {gpu.bandwidth_tb:g} TB/s",
    }
    for label, value in facts.items():
        print_line(f"[bold]{label:<18}[/] {escape(value)}")
    parameters = plan.parameters
    counted = (
        ("anchor", parameters.anchor, "the dense model, including public's FFNs"),
        ("one expert", parameters.per_expert, "FFNs, router rows and biases in every layer"),
        ("total", parameters.total, "the anchor, public's rows and the owners' experts"),
        ("active per token", parameters.active, "shared parameters, embeddings and head included, and k experts"),
    )
    print_table(
        "Parameters", ("", "parameters", "what"), [(name, human_count(n, 4), what) for name, n, what in counted]
    )
    print_table("One owner", ("", "amount", "how"), _owner_rows(plan, plan.training))
    serving = [
        (
            dtype,
            human_bytes(cost.model_bytes),
            str(cost.gpus),
            human_bytes(cost.bytes_per_token),
            f"{cost.seconds_per_token * 1000:.3g} ms",
            f"{cost.tokens_per_second:.3g}",
        )
        for dtype, cost in plan.serving.items()
    ]
    columns = ("dtype", "weights", "GPUs", "read per token", "minimum latency", "maximum tokens/s")
    print_table("Serving at batch size 1", columns, serving)


def _owner_rows(plan: Plan, training: Training) -> list[tuple[str, str, str]]:
    from flexmoe.planning.plan import USABLE_MEMORY

    parts = (training.forward_flops, training.activation_gradient_flops, training.weight_gradient_flops)
    forward, activations, weights = (f"{flops / 1e9:.3g}" for flops in parts)
    frozen, trained = human_bytes(training.frozen_bytes), human_bytes(training.trained_bytes)
    tokens = f"{training.tokens / training.trained_parameters:.3g} per trained parameter"
    if training.tokens != training.compute_optimal_tokens:
        tokens += f"; compute-optimal: {human_count(training.compute_optimal_tokens)}"
    return [
        ("package", human_bytes(plan.package_bytes), f"{plan.dtype}; router rows float32"),
        ("tokens", human_count(training.tokens), tokens),
        ("per token", f"{sum(parts) / 1e9:.3g} GFLOP", f"forward {forward}, backward {activations} + {weights}"),
        ("training", f"{training.flops:.3g} FLOP", "for all tokens"),
        ("GPU hours", f"{training.gpu_hours:.4g} h", f"at {training.mfu:.0%} of the peak (assumed)"),
        ("memory", human_bytes(training.memory_bytes), f"frozen {frozen}, trained {trained}; without activations"),
        ("GPUs for that", str(training.gpus), f"with {USABLE_MEMORY:.0%} of each one's memory"),
    ]


def _facts(found: Mapping[str, Any]) -> dict[str, Any]:
    anchor = found["anchor"]
    facts = {
        "folder": found["path"],
        "kind": "expert package" if found["kind"] == "package" else found["kind"],
        "anchor": " ".join(filter(None, (anchor.get("repo"), anchor.get("revision")))) or anchor.get("model_type"),
        "fingerprint": anchor.get("fingerprint"),
        "parameters": None if found["parameters"] is None else human_count(found["parameters"]),
        "size": None if found["bytes"] is None else human_bytes(found["bytes"]),
    }
    if found["kind"] != "package":
        facts |= {
            "experts per token": found["num_experts_per_tok"],
            "weights sum to one": "yes" if found["norm_topk_prob"] else "no",
            "public prior": found["public_prior"],
            "inference": "\n".join(_implementations(found["paths"])) if "paths" in found else None,
        }
    else:
        facts["data"] = found["experts"][0]["data_statement"]
    return facts


def _implementations(paths: Sequence[Mapping[str, Any]]) -> list[str]:
    """The implementations of layers and the reasons, one line for consecutive layers with the same one."""
    lines = []
    for (implementation, reason), group in itertools.groupby(
        paths, key=lambda path: (path["implementation"], path["reason"])
    ):
        layers = [path["layer"] for path in group]
        which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        lines.append(f"{which}: {_IMPLEMENTATIONS[implementation]} ({reason})")
    return lines


def _expert_row(expert: Mapping[str, Any], kind: str) -> list[str]:
    source = (expert["source"] or {}) if kind == "composition" else {}
    return [
        expert["name"],
        f"low-rank {_value_range(expert['rank'])}" if expert["rank"] else expert["kind"],
        "" if expert["parameters"] is None else human_count(expert["parameters"]),
        "" if expert["bytes"] is None else human_bytes(expert["bytes"]),
        _value_range(expert["row_norms"]),
        _value_range(expert["biases"]),
        source.get("repo") or source.get("folder") or "",
        (source.get("revision") or "")[:12],
        expert["license"] or "",
        expert["version"] or "",
        "" if expert["active"] else "no",
    ]


def _value_range(values: Sequence[float]) -> str:
    """The smallest and the largest of the layers' values, or one number if they are equal as shown."""
    if not values:
        return ""
    least, greatest = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == greatest else f"{least} … {greatest}"
