"""GGUF files: converted weights and tokens equal transformers' own, and what it would drop is set or refused."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers.integrations.gguf.reader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import flexmoe.io.gguf
from flexmoe.io.dense import CheckpointNamesError
from flexmoe.io.gguf import convert_gguf, is_gguf, open_gguf
from flexmoe.io.gguf_header import GgufError
from flexmoe.io.lfs import GitLfsPointerError
from flexmoe.modeling.anchors_flexmoe import UnsupportedAnchorError
from flexmoe.testing import random_tokens
from tests.support.gguf_files import END, TURN, VOCABULARY, write_gguf
from tests.support.soak import soak, thinned

pytestmark = pytest.mark.filterwarnings("ignore:.* is quantised:UserWarning")

DTYPES = {"F32": torch.float32, "F16": torch.float16, "Q8_0": torch.bfloat16, "Q4_1": torch.bfloat16}

FAMILIES: list[Any] = [
    *(("qwen2", {}), ("gpt2", {}), ("gemma2", {})),  # biases; transposed matrices; norms less one
    soak("qwen3", {"head_dim": 128}),
    soak("phi3", {"pad_token_id": 0}),
    soak("falcon", {"ffn_hidden_size": 256}),
    *(soak(name, {}) for name in ("gemma3", "stablelm", "starcoder2", "bloom", "nemotron")),
]


def loaded(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The reference: transformers' own load of the file."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_tokens(VOCABULARY, 2, 9)).logits


def ids(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("kind", thinned(DTYPES, ["F16", "Q4_1"]))
def test_a_converted_model_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "dense"))
    assert model.dtype == DTYPES[kind]
    assert torch.equal(logits(model), logits(loaded(file, DTYPES[kind])))


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="its tokenizers of GGUF files are wrong, and refused")
@pytest.mark.parametrize(("architecture", "settings"), FAMILIES)
def test_families(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    padding = {"tokenizer.ggml.padding_token_id": END}
    file = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, entries=padding, **settings)
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "dense"))
    reference = loaded(file, torch.float32)
    assert type(model) is type(reference)
    assert torch.equal(logits(model), logits(reference))


def test_a_family_that_transformers_loads_as_a_whole(tmp_path: Path) -> None:
    """LFM2, whose weights its second loader converts."""
    sizes = {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 64}
    heads = {"attention.head_count": 2, "attention.head_count_kv": [0, 1], "shortconv.l_cache": 3}
    numbers = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6}
    file = write_gguf(
        tmp_path / "tiny.gguf",
        architecture="lfm2",
        entries={f"lfm2.{key}": value for key, value in {**sizes, **heads, **numbers}.items()},
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "dense"))
    assert torch.equal(logits(model), logits(loaded(file, torch.float32)))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first arguments of the calls of `owner.name` from now on."""
    original, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="builds the tokenizers of most families in another way")
@pytest.mark.parametrize("architecture", ["llama", "bloom"])  # names of the causal LM, names of the model in it
def test_reads_and_tables_of_names_do_not_grow_with_the_tensors(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {n: write_gguf(tmp_path / f"{n}.gguf", architecture=architecture, num_hidden_layers=n) for n in (1, 4)}
    tables = counted(monkeypatch, gguf, "get_tensor_name_map")
    slow = counted(monkeypatch, gguf, "GGUFReader")
    fast = counted(monkeypatch, transformers.integrations.gguf.reader, "read_gguf_metadata")
    own = counted(monkeypatch, flexmoe.io.gguf, "read_header")
    counts = set()
    for layers, file in files.items():
        convert_gguf(file, tmp_path / f"dense-{layers}")
        assert str(file) not in map(str, slow)  # which reads a vocabulary in seconds
        counts.add(tuple(len(calls) for calls in (tables, slow, fast, own)))
        for calls in (tables, slow, fast, own):
            calls.clear()
    assert len(counts) == 1, f"(tables, slow, fast, own reads) by file: {counts}"
    assert counts.pop()[1:] == (1, 1, 1)


def test_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "dense", dtype=torch.float32))
    assert torch.equal(logits(model), logits(loaded(file, torch.float32)))


def test_what_quantisation_costs_is_shown(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    with pytest.warns(
        UserWarning, match=r"quantised \(Q4_1: 100 % of the weights, 5 bits each; F32.*bfloat16 adds a "
    ):
        convert_gguf(file, tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_gguf(write_gguf(tmp_path / "full.gguf"), tmp_path / "full")


def test_the_config_is_a_dense_models(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "Q8_0", entries={"general.name": "A title"}, rms_norm_eps=1e-5)
    config = json.loads((convert_gguf(file, tmp_path / "dense") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()


# -- tokenizer --


TEXTS = ("hello world 12", "List:\n\n1. hello\n\n2.  12", "    12", "<|turn|>hello<|end|>", "a\t\t5 ½")


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(file, tmp_path / "dense")
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert [ids(folder, text) for text in TEXTS] == [reference(text)["input_ids"] for text in TEXTS]
    assert ids(folder, "<|turn|>") == [TURN]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello<|turn|>"


def test_a_tokenizer_config_next_to_the_file_is_considered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name the class of the tokenizer, so `AutoTokenizer` chooses, although that reads the file slowly."""
    file = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with monkeypatch.context() as patched:
        calls = counted(patched, AutoTokenizer, "from_pretrained")
        folder = convert_gguf(file, tmp_path / "dense")
    assert calls == [tmp_path]
    assert [ids(folder, text) for text in TEXTS] == [reference(text)["input_ids"] for text in TEXTS]


def test_digits_are_split_where_the_file_says_so(tmp_path: Path) -> None:
    """transformers' loader keeps GPT-2's split: it reads an empty line before a number as two tokens."""
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf", pre="smollm"), tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert tokenizer.tokenize("    12") == ["ĠĠĠĠ", "1", "2"]
    expected = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    for text in TEXTS:
        assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) == expected.pre_tokenize_str(text)


@pytest.mark.parametrize(("pre", "words"), [("new-one", "the pre-tokenizer 'new-one'"), (None, "no pre-tokenizer")])
def test_an_unknown_pre_tokenizer_is_warned_of(pre: str | None, words: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", pre=pre)
    with pytest.warns(UserWarning, match=words):
        convert_gguf(file, tmp_path / "dense")


def test_generation_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", entries={"tokenizer.ggml.eot_token_id": TURN})
    folder = convert_gguf(file, tmp_path / "dense")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [END, TURN]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == END


def test_a_sequence_starts_as_the_file_says(tmp_path: Path) -> None:
    entries = {"tokenizer.ggml.bos_token_id": TURN, "tokenizer.ggml.add_bos_token": True}
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf", entries=entries), tmp_path / "dense")
    assert ids(folder, "h")[0] == TURN
    assert ids(convert_gguf(write_gguf(tmp_path / "other.gguf"), tmp_path / "other"), "h") != [TURN]


def test_no_token_is_added(tmp_path: Path) -> None:
    """transformers' loader adds "<|endoftext|>" with an id that has no embedding."""
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCABULARY
    assert len(tokenizer("<|endoftext|>")["input_ids"]) > 1
    assert tokenizer.unk_token is None


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    left_out = dict.fromkeys(f"tokenizer.ggml.{name}" for name in ("model", "tokens", "token_type", "merges", "pre"))
    file = write_gguf(tmp_path / "tiny.gguf", entries=left_out | {"llama.vocab_size": VOCABULARY})
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        folder = convert_gguf(file, tmp_path / "dense")
    assert not (folder / "tokenizer.json").exists()


# -- settings that transformers does not read --


def llama3_factors(factor: float, head_dim: int = 32) -> np.ndarray:
    """llama.cpp's computation of rope_freqs.weight, from its converter."""
    factors = []
    for freq in 1.0 / 10000.0 ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / freq
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama_3s_rotary_frequencies(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": llama3_factors(32.0)})
    model = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "dense"))
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.rope_parameters["factor"] == 32.0
    unscaled = 1.0 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
    expected = unscaled / torch.from_numpy(llama3_factors(32.0))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-5, atol=0)


def test_linear_scaling_of_rotary_frequencies(tmp_path: Path) -> None:
    entries = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    model = AutoModelForCausalLM.from_pretrained(
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", entries=entries), tmp_path / "dense")
    )
    torch.testing.assert_close(model.model.rotary_emb.inv_freq[0], torch.tensor(0.25))


def test_a_setting_without_a_place_in_the_config_is_warned_of(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", entries={"llama.residual_multiplier": 0.5})
    with pytest.warns(UserWarning, match=r"no setting for llama.residual_multiplier = 0.5"):
        convert_gguf(file, tmp_path / "dense")


# -- files that are refused --


def cut(file: Path, keep: float) -> Path:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    return file


def renamed(file: Path, name: str) -> Path:
    return file.rename(file.with_name(name))


def written(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def replaced(file: Path, old: bytes, new: bytes) -> Path:
    return written(file, file.read_bytes().replace(old, new))


ONES = np.ones(16, dtype=np.float32)

REFUSED: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "no GGUF": (
        lambda file: written(file, b"a text of some length"),
        GgufError,
        "not a GGUF file: it starts with b'a t",
    ),
    "empty": (lambda file: written(file, b""), GgufError, "not a GGUF file"),
    "version": (lambda file: written(file, b"GGUF\x01" + bytes(40)), GgufError, "GGUF version 1; versions 2 and 3"),
    "pointer": (
        lambda file: written(file, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        GitLfsPointerError,
        "Git LFS pointer",
    ),
    "cut off in the header": (lambda file: cut(write_gguf(file), 0.01), GgufError, "end within its table of contents"),
    "cut off in the weights": (lambda file: cut(write_gguf(file), 0.9), GgufError, "is cut off: .* ends at byte"),
    "split by name": (
        lambda file: renamed(write_gguf(file), "m-00001-of-00003.gguf"),
        GgufError,
        "`llama-gguf-split --merge m-00001-of-00003.gguf",
    ),
    "split": (lambda file: write_gguf(file, entries={"split.count": 3}), GgufError, "split into several files"),
    "mixture": (
        lambda file: write_gguf(file, entries={"llama.expert_count": 8}),
        UnsupportedAnchorError,
        "a mixture of experts .llama, 8 experts",
    ),
    "family": (
        lambda file: write_gguf(file, entries={"general.architecture": "mpt"}),
        UnsupportedAnchorError,
        "the architecture 'mpt', which .* It reads bloom, .*llama.*qwen2",
    ),
    "rotary scaling": (
        lambda file: write_gguf(file, entries={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}),
        UnsupportedAnchorError,
        "scales rotary frequencies .yarn",
    ),
    "rotary factors": (
        lambda file: write_gguf(file, tensors={"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)}),
        UnsupportedAnchorError,
        "not those of Llama 3",
    ),
    "setting": (
        lambda file: write_gguf(file, entries={"llama.rope.dimension_count": 32, "llama.attention.value_length": 48}),
        UnsupportedAnchorError,
        "llama.attention.value_length is 48, and transformers' LlamaConfig has 32",
    ),
    "layers": (
        lambda file: write_gguf(file, entries={"llama.block_count": 100_000}),
        GgufError,
        "block_count is 100000, and the file has tensors of 2 layers",
    ),
    "not a number": (
        lambda file: write_gguf(file, entries={"llama.rope.scaling.factor": float("nan")}),
        GgufError,
        "'llama.rope.scaling.factor' is nan",
    ),
    "two entries": (
        lambda file: replaced(write_gguf(file, entries={"general.a": 1, "general.b": 2}), b"general.b", b"general.a"),
        GgufError,
        "two entries 'general.a'",
    ),
    "no heads": (
        lambda file: write_gguf(file, entries={"llama.attention.head_count": 0}),
        GgufError,
        "do not fit together .ZeroDivisionError",
    ),
    "no such token": (
        lambda file: write_gguf(file, entries={"tokenizer.ggml.eos_token_id": 100_000}),
        GgufError,
        "do not fit together .IndexError",
    ),
    "unknown tensor": (
        lambda file: write_gguf(file, tensors={"blk.0.attn_q.bias": ONES}),
        CheckpointNamesError,
        "does not have, which transformers would leave out: blk.0.attn_q.bias",
    ),
    "missing tensor": (
        lambda file: write_gguf(file, without=("blk.1.ffn_up.weight",)),
        CheckpointNamesError,
        "missing that LlamaForCausalLM needs: model.layers.1.mlp.up_proj.weight",
    ),
    "wrong shape": (
        lambda file: write_gguf(file, entries={"llama.feed_forward_length": 96}),
        CheckpointNamesError,
        r"has the shape \[64, 64\]; the config gives \[96, 64\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, kind, words = REFUSED[case]
    file = make(tmp_path / "bad.gguf")
    with pytest.raises(kind, match=words):
        convert_gguf(file, tmp_path / "dense")
    assert list(tmp_path.iterdir()) == [file]


def test_every_cut_of_the_header_is_an_error(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    data = file.read_bytes()
    for length in range(4, 3000, 13):
        file.write_bytes(data[:length])
        with pytest.raises(GgufError, match="cut off"):
            open_gguf(file)


def test_the_gguf_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'flexmoe\[gguf\]'"):
        convert_gguf(file, tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "data", "expected"), [("a.gguf", b"", True), ("a", b"GGUF", True), ("a", b"{", False)]
)
def test_files_are_known_by_name_or_start(name: str, data: bytes, expected: Any, tmp_path: Path) -> None:
    assert is_gguf(written(tmp_path / name, data)) is expected
    assert not is_gguf(tmp_path)
