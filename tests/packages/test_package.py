"""Expert packages: they round-trip, and an invalid one, in any of its files, is refused."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import flexmoe
from flexmoe.io.strict_json import parse_json_object
from flexmoe.io.tensors import TensorFile
from flexmoe.io.writer import source_from_tensor, write_checkpoint
from flexmoe.modeling import FlexMoeConfig
from flexmoe.packages import package as package_module
from flexmoe.packages import schema
from flexmoe.packages.checks import check_config_size
from flexmoe.packages.package import ExpertManifest, ExpertPackage, PackageError, stream_package, write_package
from flexmoe.packages.schema import SCHEMA
from flexmoe.testing import ANCHOR_CONFIGS

ROOT = Path(__file__).resolve().parents[2]

MANIFEST = {
    "format_version": 1,
    "name": "math",
    "version": "1.0.0",
    "kind": "full",
    "rank": None,
    "alpha": None,
    "layers": [0, 1],
    "ffn": {"class": "LlamaMLP", "hidden": 4, "intermediate": [8, 8]},
    "dtype": "bfloat16",
    "anchor": {"repo": "owner/anchor", "revision": "abc", "fingerprint": "0" * 64, "model_type": "llama"},
    "training": {"tokens": 1000, "k": 2, "seed": 0, "config": {"learning_rate": 0.002}},
    "license": "apache-2.0",
    "data_statement": "Worked problems.",
    "sha256": {"expert.safetensors": "f" * 64},
}


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def manifest(**changes: Any) -> ExpertManifest:
    return ExpertManifest.from_dict({**MANIFEST, **changes})


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    result = {}
    for layer in (0, 1):
        result[f"layers.{layer}.ffn.up_proj.weight"] = torch.randn(8, 4, generator=generator).bfloat16()
        result[f"layers.{layer}.ffn.down_proj.weight"] = torch.randn(4, 8, generator=generator).bfloat16()
        result[f"layers.{layer}.router.weight"] = torch.randn(1, 4, generator=generator)
        result[f"layers.{layer}.router.bias"] = torch.randn(1, generator=generator)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_package(tmp_path / "math", manifest(), tensors().items())


def test_a_streamed_package_has_the_bytes_of_one_written_from_memory(folder: Path, tmp_path: Path) -> None:
    progress: list[int] = []
    sources = [source_from_tensor(name, tensor) for name, tensor in tensors().items()]
    streamed = stream_package(tmp_path / "streamed", manifest(), sources, progress=progress.append)
    assert {path.name: path.read_bytes() for path in streamed.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert sum(progress) == sum(tensor.nbytes for tensor in tensors().values())


def rewrite_weights(folder: Path, values: dict[str, torch.Tensor]) -> None:
    """Replaces the weights and the hashes in the manifest, as a malicious owner could."""
    save_file(values, folder / "expert.safetensors")
    digest = hashlib.sha256((folder / "expert.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda m: m.update(sha256={"expert.safetensors": digest}))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "expert_config.json").read_text())
    change(values)
    (folder / "expert_config.json").write_text(json.dumps(values))


class TestRoundTrip:
    def test_bytes_manifest_and_hash(self, folder: Path) -> None:
        package = ExpertPackage.open(folder)
        read = dict(package.tensors())
        assert read.keys() == tensors().keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
        assert all(read[name].dtype == tensor.dtype for name, tensor in tensors().items())
        digest = hashlib.sha256((folder / "expert.safetensors").read_bytes()).hexdigest()
        assert package.manifest == manifest(sha256={"expert.safetensors": digest})
        assert list(json.loads((folder / "expert_config.json").read_text())) == list(MANIFEST)
        assert load_file(folder / "expert.safetensors").keys() == tensors().keys()
        assert json.loads((folder / "config.json").read_text()) == {"model_type": "flexmoe_expert"}

    def test_in_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            package_module, "write_checkpoint", lambda *args, **kw: write_checkpoint(*args, **kw, max_shard_size=100)
        )
        folder = write_package(tmp_path / "math", manifest(), tensors().items())
        package = ExpertPackage.open(folder)
        assert len(package.manifest.sha256) > 2
        assert (folder / "expert.safetensors.index.json").is_file()
        assert {name: tensor.tolist() for name, tensor in package.tensors()} == {
            name: tensor.tolist() for name, tensor in tensors().items()
        }

    def test_reading_the_rows_only(self, folder: Path) -> None:
        rows = ExpertPackage.open(folder).read_rows()
        assert rows.keys() == {name for name in tensors() if ".router." in name}
        assert all(torch.equal(rows[name], tensors()[name]) for name in rows)

    def test_verifying_without_keeping_the_tensors(self, folder: Path) -> None:
        ExpertPackage.open(folder).verify()
        data = bytearray((folder / "expert.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "expert.safetensors").write_bytes(data)
        with pytest.raises(PackageError, match="SHA-256"):
            ExpertPackage.open(folder).verify()
        values = tensors()
        values["layers.0.ffn.up_proj.weight"][0, 0] = float("inf")
        rewrite_weights(folder, values)
        with pytest.raises(PackageError, match=r"up_proj\.weight' holds NaN"):
            ExpertPackage.open(folder).verify()

    def test_card(self, folder: Path) -> None:
        card = (folder / "README.md").read_text()
        for line in (
            "library_name: flexmoe",
            "- flexmoe-expert",
            "base_model: owner/anchor",
            "base_model_relation: adapter",
            "license: apache-2.0",
            "> Worked problems.",
        ):
            assert line in card.splitlines()

    def test_a_custom_card_and_a_licence_that_is_not_on_the_hub(self, tmp_path: Path) -> None:
        named = manifest(license="Our terms: ask!", anchor={**MANIFEST["anchor"], "repo": None})
        card = (write_package(tmp_path / "a", named, tensors().items()) / "README.md").read_text()
        assert "license: other\nlicense_name: our-terms-ask\n" in card  # the form that the Hub asks for
        assert "| licence | Our terms: ask! |" in card
        assert "base_model" not in card
        assert (write_package(tmp_path / "b", named, tensors().items(), card="Hi") / "README.md").read_text() == "Hi"

    def test_the_record_for_a_config(self) -> None:
        record = manifest(license=None).record()
        assert record == {
            key: MANIFEST[key] for key in ("name", "kind", "version", "data_statement", "training", "sha256")
        }

    def test_overwrite(self, folder: Path) -> None:
        with pytest.raises(FileExistsError, match="--overwrite"):
            write_package(folder, manifest(), tensors().items())
        with pytest.raises(FileExistsError, match="--overwrite"):
            stream_package(folder, manifest(), [source_from_tensor(name, value) for name, value in tensors().items()])
        write_package(folder, manifest(version="2"), tensors().items(), overwrite=True)
        assert ExpertPackage.open(folder).manifest.version == "2"


class TestManifest:
    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"format_version": 2}, "format_version is 2"),
            ({"format_version": True}, "format_version is True"),
            ({"format_version": 1.0}, r"format_version is 1\.0"),
            ({"shape": 1}, "unknown key 'shape'"),
            ({"name": "Math!"}, "is not an expert name"),
            ({"name": "keys"}, "reserved"),
            ({"name": 3}, "'name' must be text"),
            ({"version": ""}, "'version' must be"),
            ({"kind": "half"}, "one of full, low_rank"),
            ({"kind": ["full"]}, "one of full, low_rank"),
            ({"kind": "low_rank"}, "required there"),
            ({"rank": [4, 4]}, "'rank' is for kind 'low_rank'"),
            ({"kind": "low_rank", "rank": [4]}, "key 'rank' has 1 entries for 2 layers"),
            ({"kind": "low_rank", "rank": [4, 0]}, "positive integers"),
            ({"alpha": "1"}, "finite number"),
            ({"alpha": float("inf")}, "finite number"),
            ({"alpha": float("nan")}, "finite number; it is nan"),
            ({"alpha": 1e308}, "at most a million"),
            ({"layers": []}, "ascending"),
            ({"layers": [1, 0]}, "ascending"),
            ({"layers": [0, 0]}, "ascending"),
            ({"layers": [0, "1"]}, "ascending"),
            ({"layers": [-1, 0]}, "ascending"),
            ({"layers": None}, "ascending"),
            ({"ffn": {"class": "X", "hidden": 4}}, "hidden and intermediate"),
            ({"ffn": {"class": "X", "hidden": True, "intermediate": 8}}, "hidden and intermediate"),
            (
                {"ffn": {"class": "X", "hidden": 4, "intermediate": [8]}},
                "'ffn.intermediate' has 1 entries for 2 layers",
            ),
            ({"dtype": None}, "'dtype' must be"),
            ({"anchor": {"repo": "x"}}, "'anchor' must be"),
            ({"anchor": {**MANIFEST["anchor"], "fingerprint": "xyz"}}, "SHA-256"),
            ({"anchor": {**MANIFEST["anchor"], "model_type": None}}, "model_type"),
            ({"training": []}, "'training' must be"),
            ({"training": {"a": 1 << 64}}, "'training' has an integer of more than 64 bits"),
            ({"training": {"a": [{"b": -(10**90)}]}}, "'training' has an integer of more than 64 bits"),
            ({"training": {"a": nested(15)}}, "'training' is nested too deep: at most 16 levels"),
            ({"training": {"a": [0] * 10_000}}, "its entries take .* bytes in a model's config; at most 65,536"),
            ({"training": {"a": "x" * 70_000}}, "at most 65,536"),
            ({"license": 1}, "'license' must be"),
            ({"license": "x" * 1001}, "'license' must be text of at most 1,000 characters"),
            ({"data_statement": "x" * 10_001}, "'data_statement' must be text of at most 10,000 characters"),
            ({"data_statement": "\U0001f600" * 10_000}, "at most 65,536"),
            ({"dtype": "x" * 65}, "'dtype' must be"),
            ({"ffn": {"class": "x" * 201, "hidden": 4, "intermediate": 8}}, "'ffn' must be"),
            ({"ffn": {"class": "X", "hidden": (1 << 20) + 1, "intermediate": 8}}, "hidden at most 1,048,576"),
            ({"anchor": {**MANIFEST["anchor"], "model_type": "x" * 201}}, "'anchor' must be"),
            ({"anchor": {**MANIFEST["anchor"], "repo": "x" * 1001}}, "'anchor' must be"),
            ({"sha256": {}}, "at least one; it is"),
            ({"sha256": {"expert.safetensors\n": "f" * 64}}, "file names"),
            ({"sha256": {"expert.safetensors": "f" * 64 + "\n"}}, "SHA-256 in hex"),
            ({"layers": list(range(10_001))}, "ascending"),
            ({"ffn": {"class": "X", "hidden": 4.0, "intermediate": 8}}, "hidden and intermediate"),
            ({"sha256": {"../expert.safetensors": "f" * 64}}, "file names"),
            ({"sha256": {"expert.bin": "f" * 64}}, "file names"),
            ({"sha256": {"expert.safetensors": "f" * 63}}, "file names"),
        ],
    )
    def test_it_is_refused_with_file_and_key(self, change: dict[str, Any], error: str) -> None:
        with pytest.raises(PackageError, match=error) as caught:
            ExpertManifest.from_dict({**MANIFEST, **change}, where="here/expert_config.json")
        assert str(caught.value).startswith("here/expert_config.json: ")

    @pytest.mark.parametrize("key", ["name", "version", "kind", "layers", "ffn", "dtype", "anchor", "sha256"])
    def test_a_required_key(self, key: str) -> None:
        with pytest.raises(PackageError, match=f"key '{key}' is missing"):
            ExpertManifest.from_dict({name: value for name, value in MANIFEST.items() if name != key})

    def test_optional_keys(self) -> None:
        optional = {"rank", "alpha", "training", "license", "data_statement"}
        short = {name: value for name, value in MANIFEST.items() if name not in optional}
        assert ExpertManifest.from_dict(short).to_dict() == {**MANIFEST, **dict.fromkeys(optional)}

    @pytest.mark.parametrize(("change", "error"), [({"kind": "other"}, "one of"), ({"layers": [1, 0]}, "ascending")])
    def test_it_is_validated_when_constructed_in_python(self, change: dict[str, Any], error: str) -> None:
        with pytest.raises(PackageError, match=rf"^expert_config\.json: .*{error}"):
            dataclasses.replace(manifest(), **change)

    @pytest.mark.promise(
        "`ExpertPackage.open`",
        "a manifest nested deeper than 16 levels",
        "refused, so that configs of models can be copied, written and read again",
    )
    @pytest.mark.parametrize(("depth", "is_read"), [(13, True), (14, False), (300, False), (490, False), (990, False)])
    def test_a_manifest_is_not_nested_deeper_than_a_config_can_hold(
        self, depth: int, is_read: bool, folder: Path
    ) -> None:
        text = (folder / "expert_config.json").read_text()
        deep = "[" * depth + "]" * depth
        (folder / "expert_config.json").write_text(text.replace('"learning_rate": 0.002', f'"learning_rate": {deep}'))
        if not is_read:
            with pytest.raises(PackageError, match="nested too deep: at most 16 levels are read"):
                ExpertPackage.open(folder)
            return
        record = ExpertPackage.open(folder).manifest.record()
        assert parse_json_object(json.dumps({"config": {"experts": [record]}}).encode(), "config.json")

    def test_values_given_in_python_have_to_be_json(self) -> None:
        circle: list[Any] = []
        circle.append(circle)
        for training, error in (
            ({"a": circle}, "nested too deep"),
            ({"a": {1, 2}}, "cannot be written as JSON"),
            ({"a": float("inf")}, "cannot be written as JSON"),
        ):
            with pytest.raises(PackageError, match=error):
                dataclasses.replace(manifest(), training=training)

    @pytest.mark.promise(
        "`ExpertPackage.open`", "texts of 900 kB in a manifest", "refused; a config holds the largest of 450 experts"
    )
    def test_the_largest_records_of_many_experts_fit_into_a_config(self) -> None:
        largest = manifest(training={"a": "x" * 55_000}, license="x" * 1000, data_statement="y" * 8000).record()
        config = FlexMoeConfig(anchor_config=ANCHOR_CONFIGS["llama"](), experts=["public"])
        with pytest.raises(ValueError, match=r"config\.json would have .* bytes; at most 33,554,432 are read"):
            check_config_size(config, *[largest] * 600)
        check_config_size(config, *[largest] * 450)
        text = json.dumps({"experts": [largest] * 450}, indent=2)
        assert len(parse_json_object(text.encode(), "config.json")["experts"]) == 450

    def test_an_error_in_a_package_names_the_file(self, folder: Path) -> None:
        edit(folder, lambda m: m.update(name="keys"))
        with pytest.raises(PackageError, match="reserved") as caught:
            ExpertPackage.open(folder)
        assert str(caught.value).startswith(f"{folder / 'expert_config.json'}: ")

    def test_the_published_schema_is_the_one_in_use(self) -> None:
        published = ROOT / "docs" / "expert-package.schema.json"
        assert published.read_text() == json.dumps(SCHEMA, indent=2) + "\n", "write SCHEMA there"
        jsonschema.Draft202012Validator.check_schema(SCHEMA)
        jsonschema.validate(MANIFEST, SCHEMA)

    def test_without_jsonschema(self, monkeypatch: pytest.MonkeyPatch) -> None:
        schema._validator.cache_clear()
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        with pytest.raises(ImportError, match="pip install jsonschema"):
            manifest()


class TestInvalidPackages:
    def open_and_read(self, folder: Path) -> dict[str, torch.Tensor]:
        return dict(ExpertPackage.open(folder).tensors())

    def test_a_changed_byte(self, folder: Path) -> None:
        path = folder / "expert.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        seen: list[str] = []
        with pytest.raises(PackageError, match=r"expert\.safetensors: its SHA-256 is"):
            seen.extend(name for name, _ in ExpertPackage.open(folder).tensors())
        assert len(seen) == len(tensors()) - 1  # the last one is held back

    def test_a_changed_header(self, folder: Path) -> None:
        path = folder / "expert.safetensors"
        data = path.read_bytes()
        path.write_bytes(data.replace(b"up_proj", b"dn_proj"))
        with pytest.raises(PackageError, match="SHA-256"):
            self.open_and_read(folder)

    def test_a_file_replaced_after_opening(self, folder: Path) -> None:
        package = ExpertPackage.open(folder)
        values = tensors()
        values["layers.0.ffn.gate_proj.weight"] = values.pop("layers.0.ffn.up_proj.weight")
        rewrite_weights(folder, values)
        with pytest.raises(PackageError, match="changed since the package was opened"):
            dict(package.tensors())

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2])
    def test_numbers_that_are_not_finite(
        self, number: float, dtype: torch.dtype, folder: Path, tmp_path: Path
    ) -> None:
        values = {name: tensor.to(dtype) if ".ffn." in name else tensor for name, tensor in tensors().items()}
        bad = torch.zeros(8, 4)
        bad[3, 2] = number
        values["layers.1.ffn.up_proj.weight"] = bad.to(dtype)
        rewrite_weights(folder, values)
        edit(folder, lambda m: m.update(dtype=str(dtype).removeprefix("torch.")))
        with pytest.raises(PackageError, match=r"layers\.1\.ffn\.up_proj\.weight' holds NaN or an infinity") as caught:
            self.open_and_read(folder)
        assert str(caught.value).startswith(f"{folder / 'expert.safetensors'}: ")
        with pytest.raises(PackageError, match="holds NaN"):
            write_package(tmp_path / "new", manifest(dtype=str(dtype).removeprefix("torch.")), values.items())
        assert os.listdir(tmp_path) == ["math"]

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (lambda t: t.update({"layers.2.ffn.x": torch.ones(1).bfloat16()}), "no place .* with layers 0 to 1;"),
            (lambda t: t.update({"layers.00.ffn.x": torch.ones(1).bfloat16()}), "no place"),
            (lambda t: t.update({"anchor.model.embed_tokens.weight": torch.ones(1)}), "no place"),
            (lambda t: t.update({"layers.0.attention.weight": torch.ones(1)}), "no place"),
            (lambda t: t.update({"layers.0.ffn.../x": torch.ones(1).bfloat16()}), "no place"),
            (lambda t: t.update({"layers.0.ffn.count": torch.ones(1, dtype=torch.int64)}), "floating-point"),
            (lambda t: t.update({"layers.0.router.weight": torch.ones(4)}), r"a row is \[1, 4\]"),
            (lambda t: t.update({"layers.0.router.weight": torch.ones(1, 5)}), r"a row is \[1, 4\]"),
            (lambda t: t.update({"layers.0.router.bias": torch.ones(2)}), r"a bias \[1\]"),
            (lambda t: t.pop("layers.1.router.bias"), r"no tensor layers\.1\.router\.bias"),
            (
                lambda t: [t.pop(f"layers.1.ffn.{name}_proj.weight") for name in ("up", "down")],
                r"no tensor layers\.1\.ffn\.\*",
            ),
            (lambda t: t.update({"layers.0.ffn.up_proj.weight": torch.ones(8, 4)}), "the weights are mixed"),
        ],
    )
    def test_wrong_tensors(
        self, change: Callable[[dict[str, torch.Tensor]], Any], error: str, folder: Path, tmp_path: Path
    ) -> None:
        values = tensors()
        change(values)
        rewrite_weights(folder, values)
        with pytest.raises(PackageError, match=error) as caught:
            ExpertPackage.open(folder)
        assert str(caught.value).startswith(f"{folder}: ")
        with pytest.raises(PackageError, match=error) as caught:
            write_package(tmp_path / "new", manifest(), values.items())
        assert str(caught.value).startswith(f"{tmp_path / 'new'}: ")

    @pytest.mark.parametrize(
        ("hidden", "layers", "error"),
        [
            (10**9, 1, "hidden at most 1,048,576"),
            (1 << 20, 80, r"router rows take 335,544,640 bytes; at most 268,435,456 are read.*1,048,576"),
            (4, 1, r"has shape \[1, 1000000000\]; a row is \[1, 4\]"),
        ],
    )
    def test_rows_of_any_width_are_refused_by_the_header(
        self, hidden: int, layers: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The weights are a sparse file, which costs its author nothing."""
        width = 10**9 if hidden == 4 else hidden
        entries, end = {}, 0
        for layer in range(layers):
            for name, shape in {"ffn.up_proj.weight": [1], "router.weight": [1, width], "router.bias": [1]}.items():
                begin, end = end, end + 4 * shape[-1]
                entries[f"layers.{layer}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        header = json.dumps(entries).encode()
        folder = tmp_path / "wide"
        folder.mkdir()
        with (folder / "expert.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        values = {"layers": list(range(layers)), "ffn": {"class": "X", "hidden": hidden, "intermediate": 8}}
        text = json.dumps({**MANIFEST, **values, "dtype": "float32"})
        (folder / "expert_config.json").write_text(text)
        monkeypatch.setattr(TensorFile, "fill", None)  # no data may be read
        monkeypatch.setattr(TensorFile, "chunks", None)
        for read in (ExpertPackage.open, flexmoe.inspect):
            with pytest.raises(PackageError, match=error):
                read(folder)

    def test_missing_and_additional_files(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no folder"):
            ExpertPackage.open(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="not an expert package"):
            ExpertPackage.open(tmp_path)
        shutil.copyfile(folder / "expert.safetensors", folder / "expert-00001-of-00001.safetensors")
        with pytest.raises(PackageError, match="does not name the weight file 'expert-00001"):
            ExpertPackage.open(folder)
        (folder / "expert-00001-of-00001.safetensors").unlink()
        (folder / "expert.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no file expert\.safetensors"):
            ExpertPackage.open(folder)

    @pytest.mark.parametrize("name", ["expert.safetensors", "expert_config.json"])
    def test_links_out_of_the_folder(self, name: str, folder: Path, tmp_path: Path) -> None:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(PackageError, match="leads out of the folder"):
            ExpertPackage.open(folder)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("[]", "expected a JSON object"),
            ("{", "not valid JSON"),
            ('{"format_version": NaN}', "NaN"),
            ('{"a": 1, "a": 2}', "given twice"),
            ("[" * 100_000, "nested too deep"),
            ('{"license": "' + "x" * (1 << 20) + '"}', "larger than the 1,048,576 bytes"),
        ],
    )
    def test_a_manifest_that_is_not_json(self, text: str, error: str, folder: Path) -> None:
        (folder / "expert_config.json").write_text(text)
        with pytest.raises(PackageError, match=error):
            ExpertPackage.open(folder)

    def test_a_duplicate_tensor_name_is_not_written(self, tmp_path: Path) -> None:
        duplicates = [*tensors().items(), *tensors().items()]
        with pytest.raises(PackageError, match="given twice"):
            write_package(tmp_path / "out", manifest(), duplicates)
