"""The config entry and the router file of a composition, both of which are untrusted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexmoe.composition.format import ROUTER_FILE, Composition, read_router
from flexmoe.modeling import FlexMoeConfig
from flexmoe.testing import tiny_flexmoe

H = 32
ROW, BIAS = "anchor.model.layers.0.mlp.router.math.weight", "anchor.model.layers.1.mlp.router.public.bias"
DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def config() -> FlexMoeConfig:
    return tiny_flexmoe("llama", ["math"]).config


def written(folder: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    save_file(dict(tensors), folder / ROUTER_FILE)
    return hashlib.sha256((folder / ROUTER_FILE).read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_converted_to_float32(config: FlexMoeConfig, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {ROW: torch.full((1, H), 0.5, dtype=dtype), BIAS: torch.tensor([2.0], dtype=dtype)}
    rows = read_router(tmp_path, written(tmp_path, tensors), config)
    assert {name: (row.dtype, row.tolist()) for name, row in rows.items()} == {
        ROW: (torch.float32, [[0.5] * H]),
        BIAS: (torch.float32, [2.0]),
    }
    assert read_router(tmp_path, None, config) == {}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (ROW, torch.zeros(1, H + 1), "is not a router row of this model"),
        (ROW, torch.zeros(H), "is not a router row of this model"),
        (BIAS, torch.zeros(1, 1), "is not a router row of this model"),
        (ROW, torch.zeros(1, H, dtype=torch.int32), "I32 is not a router row of this model"),
        (ROW, torch.zeros(1, H, dtype=torch.complex64), "C64 is not a router row of this model"),
        (ROW.replace("math", "law"), torch.zeros(1, H), r"for the experts \['public', 'math'\]"),
        (ROW.replace("router", "experts"), torch.zeros(1, H), "is not a router row of this model"),
        (f"{ROW}.more", torch.zeros(1, H), "is not a router row of this model"),
        ("router.math.weight", torch.zeros(1, H), "is not a router row of this model"),
        (ROW, torch.full((1, H), torch.nan), "holds NaN"),
        (BIAS, torch.tensor([-torch.inf]), "an infinity"),
        (BIAS, torch.tensor([1e300], dtype=torch.float64), "too large for float32"),
    ],
)
def test_tensors_that_are_not_rows(
    config: FlexMoeConfig, tmp_path: Path, name: str, tensor: torch.Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"{ROUTER_FILE}: '{name}'.*{words}"):
        read_router(tmp_path, written(tmp_path, {name: tensor}), config)


def test_more_bytes_than_all_rows_are_refused(config: FlexMoeConfig, tmp_path: Path) -> None:
    rows = {f"anchor.model.layers.{i}.mlp.router.math.weight": torch.zeros(1, H) for i in range(9)}
    with pytest.raises(ValueError, match=r"rows of 1,152 bytes; those of all experts take at most 1,056"):
        read_router(tmp_path, written(tmp_path, rows), config)


def test_a_large_unknown_tensor_is_refused_unread(
    config: FlexMoeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = written(tmp_path, {ROW: torch.zeros(1000, H)})
    monkeypatch.setattr("flexmoe.composition.format.empty_tensor", lambda info: 1 / 0)
    with pytest.raises(ValueError, match="is not a router row of this model"):
        read_router(tmp_path, digest, config)


def test_a_changed_file_is_refused(config: FlexMoeConfig, tmp_path: Path) -> None:
    written(tmp_path, {ROW: torch.zeros(1, H)})
    with pytest.raises(ValueError, match=f"{ROUTER_FILE}: its SHA-256 is .*, config.json says {DIGEST}"):
        read_router(tmp_path, DIGEST, config)


def entry(**changes: Any) -> dict[str, Any]:
    expert = {"folder": "../math", "sha256": {"expert.safetensors": DIGEST}}
    values: dict[str, Any] = {"format_version": 1, "anchor": {"folder": "../anchor"}, "router_sha256": DIGEST}
    return {**values, "experts": {"math": {**expert, **changes.pop("math", {})}}, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"math": {"sha256": [1]}}, r"expert 'math': sha256 must map .* it is \[1\]"),
        ({"math": {"sha256": 7}}, "expert 'math': sha256 must map"),
        ({"math": {"sha256": None}}, "expert 'math': sha256 must map"),
        ({"math": {"sha256": {}}}, "expert 'math': sha256 must map"),
        ({"math": {"sha256": {"expert.safetensors": 7}}}, "expert 'math': sha256 must map"),
        ({"math": {"sha256": {"expert.safetensors": "0" * 63}}}, "expert 'math': sha256 must map"),
        ({"math": {"sha256": {"expert.safetensors": "z" * 64}}}, "expert 'math': sha256 must map"),
        ({"router_sha256": 5}, "router_sha256 must be 64 hexadecimal digits or null; it is 5"),
        ({"router_sha256": ""}, "router_sha256 must be 64"),
        ({"router_sha256": [DIGEST]}, "router_sha256 must be 64"),
    ],
)
def test_malformed_hashes(config: FlexMoeConfig, changes: dict[str, Any], words: str) -> None:
    config.composition = entry(**changes)
    with pytest.raises(ValueError, match=words):
        Composition.from_config(config)
    for valid in (DIGEST, None):
        config.composition = entry(router_sha256=valid)
        assert Composition.from_config(config).router_sha256 == valid


@pytest.mark.parametrize("values", [[1, 2], "text", 7])
def test_a_composition_that_is_not_an_object(config: FlexMoeConfig, values: Any) -> None:
    object.__setattr__(config, "composition", values)
    with pytest.raises(ValueError, match=r"composition: .* is not an object"):
        Composition.from_config(config)
