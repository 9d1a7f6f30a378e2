"""FlexMoE: a dense anchor of any family, with named experts in place of its feed-forward networks.

Attention, rotary embeddings, norms, caches and the head are the anchor's own code. Does not cover changing experts
(`lifecycle_flexmoe`), the block (`experts_flexmoe`), or where a family has its FFNs (`anchors_flexmoe`).
"""

import contextlib
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import ModelOutput

from .adapters_flexmoe import AdapterWatch, refuse_wrapped
from .anchors_flexmoe import ANCHOR_PREFIX, NameMap, find_ffn_sites
from .configuration_flexmoe import EXPERTS_FORWARDS, FlexMoeConfig, check_top_k, optional_flexmoe, require_flexmoe
from .distributed_flexmoe import class_without_fsdp, is_sharded
from .evidence_flexmoe import read_evidence, remember_tokens, token_ids
from .experts_flexmoe import FlexMoeBlock
from .fingerprint_flexmoe import align_tensors, refresh_fingerprint
from .lifecycle_flexmoe import ExpertLifecycle
from .masking_flexmoe import (
    ForwardContext,
    checkpoint_with_context,
    forward_scope,
    model_scope,
    scoped_values,
    select_experts,
    stamp_cache,
)
from .routing_flexmoe import load_balancing_loss, router_z_loss

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_OWNED = r"\.(?:experts|router)\."
_ROUTER = r".+(?<!\.experts)\.router(?=\.|$)"  # an expert may be called "router"
_PATTERNS = ("_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
_EXPERT_TENSOR = re.compile(r"\.(?:experts|router)\.(?P<name>[a-z][a-z0-9_-]*)\.")
Experts = Sequence[str] | Sequence[Sequence[str] | None] | None
_OURS = frozenset({"experts", "expert_mask", "num_experts_per_tok", "output_router_logits", "return_dict"})
_COMMON = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"})
_COMMON |= {"labels", "logits_to_keep", "is_first_iteration", "next_sequence_length"}  # of generate
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class FlexMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """transformers' MoE output, and the router z-loss (a scalar, with `output_router_logits=True`)."""

    z_loss: Tensor | None = None


class FlexMoePreTrainedModel(ExpertLifecycle, AdapterWatch, PreTrainedModel):
    """Common to both models: the module tree, the context of a forward pass, loading and saving."""

    config: FlexMoeConfig
    base_model_prefix = "anchor"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # rows are tiny and decide everything; quantisers read the second, and some would replace the container of experts
    _keep_in_fp32_modules_strict = [_ROUTER]  # noqa: RUF012 - transformers' own declaration
    _keep_in_fp32_modules = [rf"(?:{_ROUTER}|.+\.experts$)"]  # noqa: RUF012 - transformers' own declaration

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the anchor's modules are transformers' own code and have to be initialised as such."""
        return False

    def __init__(self, config: FlexMoeConfig) -> None:
        super().__init__(config)
        config.composition = None  # wherever it was loaded from, a model holds its weights
        self.anchor = AutoModelForCausalLM.from_config(config.anchor_config)
        # there is no other attention, and some families choose theirs themselves
        config._attn_implementation_internal = self.anchor.config.get_text_config()._attn_implementation
        sites = find_ffn_sites(self.anchor)
        self.anchor_names = NameMap(sites)
        if config.norm_topk_prob is None:  # a saved config has it
            norms = require_flexmoe("norms", "norm_topk_prob=None")
            config.norm_topk_prob = not norms.norm_follows_each_ffn(config.anchor_config)
        blocks = {}
        for site in sites:
            block = blocks[f"{ANCHOR_PREFIX}{site.block}"] = FlexMoeBlock(site.ffn(self.anchor), config, site.index)
            site.put(self.anchor, block)
        self._keywords = _keywords_of(self.anchor)
        self._start_lifecycle(blocks)
        self.post_init()

    def post_init(self) -> None:
        """As in transformers; the anchor's tensor names get its prefix, its patterns match no owner's tensors."""
        ties = self.anchor.all_tied_weights_keys.items()
        self._tied_weights_keys = {ANCHOR_PREFIX + name: ANCHOR_PREFIX + to for name, to in ties}
        super().post_init()
        for kind in _PATTERNS:
            patterns = {p if p == _ROUTER else rf"^(?!.*{_OWNED}).*(?:{p})" for p in getattr(self, kind)}
            setattr(self, kind, patterns)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        missing_experts: str = "error",
        policy: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; the anchor and experts of a composition are fetched from where it refers to.

        An expert without its tensors, or tensors without their expert, is an error.

        Args:
            experts_implementation: "eager", or with the package `flexmoe` "auto" (default), "flexmoe_cpu" or
                "flexmoe_triton".
            missing_experts: for experts of a composition whose owners have withdrawn them or restricted access:
                "error" raises an error that names them, "skip" loads the model without them, with a warning.
            policy: whose packages a composition may contain: a policy file, by default the one that the environment
                variable FLEXMOE_POLICY names.

        Raises:
            ValueError: config and tensors disagree about the experts or their shapes; the folder holds another model
                (a dense anchor, an expert package); or a part of a composition is not the one that was saved.
            ImportError: it is a composition, and the package `flexmoe` is not installed.
        """
        source = pretrained_model_name_or_path
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        if missing_experts not in ("error", "skip"):
            raise ValueError(f"missing_experts={missing_experts!r}: it must be 'error' or 'skip'.")
        if _is_composition(cls.config_class, source, config, kwargs):
            load = require_flexmoe("composition.load", "loading a composition")
            given = {"missing_experts": missing_experts, "policy": policy}
            with load.load_arguments(cls.config_class, source, config, kwargs, **given) as resolved:
                model, info = super().from_pretrained(None, *args, **options, **resolved)
            load.check_complete(source, info)
            model.name_or_path = model.config.name_or_path = str(source)
        else:
            model, info = super().from_pretrained(source, *args, config=config, **options)
        _check_loaded_experts(model.expert_names, info, ignore_mismatched_sizes)
        align_tensors(model)
        if quantization := getattr(model, "hf_quantizer", None) and optional_flexmoe("packages.quantization"):
            quantization.warn_if_nothing_was_quantized(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with tensor names as in the state dict; a modified anchor gets a new fingerprint.

        A model in `save_directory` is replaced once the new one is written, so a failure leaves it as it was.

        Raises:
            ValueError: PEFT has wrapped this model (`get_peft_model`), so its tensors have other names.
        """
        if not self._hf_peft_config_loaded:  # adapters of `add_adapter` are saved alone, without the model
            refuse_wrapped(self, kwargs.get("state_dict"))
            refresh_fingerprint(self, kwargs.get("state_dict"))
        # some families are stored under older names (GPT-NeoX's head), which streaming readers could not match
        kwargs.setdefault("save_original_format", False)
        is_main_process = kwargs.get("is_main_process", args[0] if args else True)
        if class_without_fsdp(type(self)) is not type(self) and self.should_save_on_this_rank(is_main_process):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.save_code(save_directory)
        if kwargs.get("push_to_hub") or is_sharded(self) or not (Path(save_directory) / "config.json").exists():
            return super().save_pretrained(save_directory, *args, **kwargs)
        with _replacing_files(Path(save_directory)) as folder:
            super().save_pretrained(folder, *args, **kwargs)

    @classmethod
    def save_code(cls, folder: str | Path) -> None:
        """Copies the files that this class consists of into `folder`, for loading with `trust_remote_code=True`."""
        custom_object_save(class_without_fsdp(cls), folder)

    @classmethod
    def is_remote_code(cls) -> bool:
        """As in transformers; False for the class that FSDP2 derives from a model's, whose file is PyTorch's."""
        return super().is_remote_code() and class_without_fsdp(cls) is cls

    # The implementation of the experts

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation for `experts_implementation=requested_experts`; None takes the default.

        Raises:
            ValueError: it is not available; the message lists those that are.
        """
        name = EXPERTS_FORWARDS.check(requested_experts)
        EXPERTS_FORWARDS[name]  # imported here: compiled code cannot import
        return name

    def get_experts_implementation(self) -> dict[str, str | None]:
        """The implementation of the experts, in transformers' form: `{"": name}`."""
        return {"": self.config._experts_implementation}

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Chooses how experts run: "eager", or an entry of `EXPERTS_FORWARDS` that the package `flexmoe` adds.

        Raises:
            ValueError: it is not available; the message lists those that are.

        Example:
            model.set_experts_implementation("eager")
        """
        self.config._experts_implementation = experts_implementation
        self.get_correct_experts_implementation(self.config._experts_implementation)

    # Several processes

    def init_parallel_plans(self) -> None:
        """As in transformers; the package extends the anchor's plans to every expert."""
        super().init_parallel_plans()
        if parallel := optional_flexmoe("parallel"):
            parallel.extend_plans(self)

    @classmethod
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config: Any, mesh: Any) -> Any:
        """As in transformers. ValueError: pipeline stages, which would not receive the selection of experts.

        ImportError: the package `flexmoe` is not installed, which plans how experts are sharded.
        """
        if mesh is not None and distributed_config.pp_size > 1:
            raise ValueError(
                f"pp_size={distributed_config.pp_size}: FlexMoE does not run as a pipeline of stages. Use tp_size or "
                "fsdp_size of DistributedConfig."
            )
        if mesh is not None:
            require_flexmoe("parallel", "a model on several devices")
        return super().maybe_distribute_model(model, distributed_config, mesh)

    def gather_sharded_state_dict_for_save(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in transformers, which recognises tied tensors by their memory; gathered tensors share none."""
        state = super().gather_sharded_state_dict_for_save(*args, **kwargs)
        tied = self.all_tied_weights_keys if is_sharded(self) else {}
        return {name: value for name, value in state.items() if name not in tied}

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Re-entrant activation checkpointing loses the gradients of a router: leave use_reentrant at False."
            )
        super()._set_gradient_checkpointing(enable, checkpoint_with_context(gradient_checkpointing_func), **kwargs)

    # The anchor's parts

    @property
    def base_model(self) -> Any:
        """The anchor's decoder without its head; trainers that compute their own loss call it, see `DecoderCall`."""
        return DecoderCall(self)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The anchor's token embeddings."""
        return self.anchor.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replaces the anchor's token embeddings."""
        self.anchor.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """The anchor's head; None in a FlexMoeModel."""
        return self.anchor.get_output_embeddings()

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        """Replaces the anchor's head."""
        self.anchor.set_output_embeddings(value)

    def get_decoder(self) -> torch.nn.Module:
        """The anchor's decoder."""
        return self.anchor.get_decoder()

    def _run(
        self,
        module: torch.nn.Module,
        output_class: type[ModelOutput],
        experts: Experts = None,
        expert_mask: Tensor | None = None,
        num_experts_per_tok: int | None = None,
        output_router_logits: bool | None = None,
        **inputs: Any,
    ) -> tuple[Any, ForwardContext]:
        """Runs the anchor's `module` with the experts of this call; its output as `output_class`, and the context."""
        if unknown := sorted(inputs.keys() - self._keywords):
            raise TypeError(f"The model does not use {unknown}. It uses {sorted(self._keywords | _OURS)}.")
        k = check_top_k(self.config.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok)
        collect = self.config.output_router_logits if output_router_logits is None else output_router_logits
        input_ids, past_key_values = inputs.get("input_ids"), inputs.get("past_key_values")
        tokens = inputs.get("inputs_embeds") if input_ids is None else input_ids
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            self.check_adapters()
        with contextlib.nullcontext() if is_compiling else self._guard.forward_pass():
            selection = select_experts(self, None if tokens is None else tokens.shape[0], expert_mask, experts)
            context = ForwardContext(
                names=selection.names,
                row_mask=selection.row_mask,
                top_k=k,
                renormalize=bool(self.config.norm_topk_prob),
                implementation=self.config._experts_implementation or "eager",
                router_logits=[] if collect else None,
                usage=scoped_values(self, "usage"),
                token_mask=_token_mask(tokens, inputs.get("attention_mask")),
                stamp=self._stamp(selection),
                evidence=read_evidence(self, selection.names, inputs),
            )
            stamp_cache(past_key_values, context.stamp)
            with forward_scope(context):
                out = module(return_dict=True, **inputs)
        stamp_cache(out.get("past_key_values"), context.stamp)
        if context.evidence:
            remember_tokens(out.get("past_key_values"), token_ids(inputs))
        # GPT-2 and others also return `cross_attentions`, which are dropped
        moe: Any = output_class(**{name: out[name] for name in out if name in output_class.__dataclass_fields__})
        if context.router_logits:
            moe.router_logits = tuple(context.router_logits)
            if output_router_logits:
                for collected in scoped_values(self, "router_logits"):
                    collected.append(moe.router_logits)
        return moe, context

    def _router_losses(self, out: Any, context: ForwardContext) -> tuple[Tensor | float, Tensor | None, Tensor | None]:
        """What the routers add to the loss, the load-balancing loss, and the z-loss."""
        if not out.router_logits:
            return 0.0, None, None
        aux_loss = load_balancing_loss(
            out.router_logits, context.top_k or self.config.num_experts_per_tok, context.token_mask
        )
        z_loss = router_z_loss(out.router_logits, context.token_mask)
        added = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        return added.to(self.device), aux_loss, z_loss

    def _returned(self, out: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


class DecoderCall:
    """The anchor's decoder which, when it is called, runs with the experts of its FlexMoE, as that does itself."""

    def __init__(self, model: FlexMoePreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.anchor.base_model, name)

    def __call__(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As `FlexMoeModel.forward`. ValueError: who asks for router logits would take too many experts per token."""
        config = self._model.config
        if kwargs.get("output_router_logits") and config.num_experts_per_tok > config.num_experts:
            raise ValueError(
                f"This model has {config.num_experts} experts: set model.config.num_experts_per_tok = "
                f"{config.num_experts} instead of {config.num_experts_per_tok}. It routes alike, but a trainer that "
                "computes the load-balancing loss itself, as TRL does, needs a number that is not above theirs."
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        return self._model._run(self._model.anchor.base_model, MoeModelOutputWithPast, **inputs)[0]


class FlexMoeModel(FlexMoePreTrainedModel):
    """The decoder: the tree of `FlexMoeForCausalLM` without its head, so that both name every tensor alike."""

    def post_init(self) -> None:
        """Removes the head, then as in transformers."""
        head = self.anchor.get_output_embeddings()
        names = {name for name, module in self.named_modules() if module is head}
        self.anchor.set_output_embeddings(None)
        self.anchor._is_hf_initialized = True  # the wrapper itself would only initialise its head
        heads = tuple(name.removeprefix(ANCHOR_PREFIX) for name in names)
        ties = self.anchor.all_tied_weights_keys.items()
        self.anchor.all_tied_weights_keys = {name: to for name, to in ties if not name.startswith(heads)}
        self.anchor._tied_weights_keys = None
        super().post_init()
        for name in names:
            self._tp_plan.pop(name, None)
            self._keys_to_ignore_on_load_unexpected |= {rf"^{re.escape(name)}\."}

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast | tuple:
        """As the anchor's decoder; experts are chosen as in `FlexMoeForCausalLM.forward`."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}
        inputs |= {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        out, _ = self._run(self.anchor.base_model, MoeModelOutputWithPast, **inputs, **kwargs)
        return self._returned(out, return_dict)


class FlexMoeForCausalLM(FlexMoePreTrainedModel, GenerationMixin):
    """A causal language model with named experts in a dense anchor. Source: FlexOlmo, arXiv 2507.07024.

    Example:
        model = AutoModelForCausalLM.from_pretrained("path/to/model")
        logits = model(**inputs, num_experts_per_tok=2).logits
    """

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        experts: Experts = None,
        expert_mask: torch.BoolTensor | None = None,
        num_experts_per_tok: int | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexMoeCausalLMOutputWithPast | tuple:
        """As the anchor's forward pass, and:

        Args:
            experts: names of the experts that may take part, or one list of names (None for all) per sequence.
            expert_mask: the same as a tensor, bool [batch, experts], True where a sequence may use an expert; columns
                in the order of `expert_names`. Both apply within the active set and `only_experts`.
            num_experts_per_tok: k of this call; the config's by default.
            output_router_logits: return `router_logits` (one [tokens, experts] per layer, -inf where not allowed),
                `aux_loss` (load balancing) and `z_loss`, and add both to `loss` with the config's coefficients.

        Raises:
            ValueError: an unknown name, a sequence is left without an expert, the mask has another shape, k is below
                1, or the cache was filled by other experts.
            TypeError: the mask is not of dtype bool, or the model does not use one of the keyword arguments.
            RuntimeError: `only_experts` is open in another thread and not in this one (see there).
        """
        out, context = self._run(
            self.anchor,
            FlexMoeCausalLMOutputWithPast,
            experts,
            expert_mask,
            num_experts_per_tok,
            output_router_logits,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        added, out.aux_loss, out.z_loss = self._router_losses(out, context)
        if out.loss is not None:
            out.loss = out.loss + added * _share_of_batch(labels, kwargs)
        return self._returned(out, return_dict)

    def generate(self, *args: Any, experts: Experts = None, **kwargs: Any) -> Any:
        """As `generate` in transformers; `experts` names the experts that may take part.

        With `output_router_logits=True` and `return_dict_in_generate=True`, the result has `router_logits`: for each
        forward pass what `forward` returns.

        Args:
            experts: names for all prompts, or one list of names (None for all) per prompt, within the active set.
                Beams and returned sequences use their prompt's. By default `experts` of the generation config.

        Raises:
            ValueError: an unknown name, an empty list, or lists or an `expert_mask` for another number of prompts.
            TypeError: `experts` is a string, or `expert_mask` is not a bool tensor.
            RuntimeError (in the changing thread): experts are changed while this runs.

        Example:
            model.generate(**inputs, experts=["public", "math"])
        """
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        experts = getattr(config or self.generation_config, "experts", None) if experts is None else experts
        if kwargs.get("cache_implementation") == "paged":
            batching = require_flexmoe("batching", "continuous batching")
            return batching.generate_paged(self, super().generate, experts, args, kwargs)
        with self._guard.generation(), contextlib.ExitStack() as scopes:
            if (k := kwargs.get("num_experts_per_tok")) is not None:
                check_top_k(k)
            mask, prompts = kwargs.get("expert_mask"), _prompts(args, kwargs)
            # checked here, where rows are prompts: in the forward pass they are beams
            if mask is not None:
                select_experts(self, prompts, mask)
            if experts is not None:
                named = self.mask_of(experts, prompts)
                mask = kwargs["expert_mask"] = named if mask is None else named & mask.to(named.device)
                select_experts(self, prompts, mask)
            if mask is not None:  # for passes that are not given it, such as the unconditional one of guidance
                scopes.enter_context(model_scope(self, "generate", mask))
            logits: list[Any] = []
            if kwargs.get("output_router_logits"):
                scopes.enter_context(model_scope(self, "router_logits", logits))
            out = super().generate(*args, **kwargs)
            if logits and isinstance(out, ModelOutput):
                out["router_logits"] = tuple(logits)
            return out

    def init_continuous_batching(self, *args: Any, experts: list[str] | None = None, **kwargs: Any) -> Any:
        """As in transformers; requests use the experts of this call, see `flexmoe.batching.start_manager`."""
        batching = require_flexmoe("batching", "continuous batching")
        return batching.start_manager(self, super().init_continuous_batching, experts, args, kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, experts: Experts = None, **kwargs: Any) -> Any:
        """As in transformers; `experts` as in `generate`, see `flexmoe.batching.generate_batch`."""
        batching = require_flexmoe("batching", "continuous batching")
        return batching.generate_batch(self, super().generate_batch, inputs, experts, args, kwargs)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; an assistant is not passed a selection of experts, for its own are others."""
        if kwargs.get("assistant_model") not in (None, self):
            ours = ("expert_mask", "num_experts_per_tok")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As the anchor's family does it; `generate` looks for `inputs_embeds` in this signature."""
        return self.anchor.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)


def _share_of_batch(labels: Tensor | None, options: Mapping[str, Any]) -> Tensor | float:
    """How many of the labels of an accumulated batch are here; 1 if unknown.

    The language modelling loss is divided by all of them, so what is added to it must count by its share, too.
    """
    total, shifted = options.get("num_items_in_batch"), options.get("shift_labels")
    if total is None or labels is None:
        return 1.0
    return ((labels[..., 1:] if shifted is None else shifted) != -100).sum() / total


def _prompts(args: tuple, kwargs: dict[str, Any]) -> int:
    """The number of prompts in a call of `generate`."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompts = args[0] if args else next((value for value in named if value is not None), None)
    return 1 if prompts is None else len(prompts)


def _keywords_of(anchor: PreTrainedModel) -> frozenset[str]:
    """The keyword arguments that a dense model or its layers use; its `forward` would drop others silently."""
    names = {*TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__, "shift_labels"}
    for kind in {type(module) for module in (anchor, anchor.base_model, *anchor.modules())}:
        parameters = inspect.signature(kind.forward).parameters
        if kind in (type(anchor), type(anchor.base_model)) or _takes_keywords(parameters):
            names.update(parameters)
    return frozenset((names | _COMMON) - {"self", "args", "kwargs", "return_dict"})


def _takes_keywords(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _token_mask(inputs: Tensor | None, attention_mask: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    """bool [tokens], False for padding, if the attention mask is [batch, sequence] for this input.

    With a static cache it is not: `generate` passes 4-dimensional masks, one per kind of layer in families such as
    Gemma-2.
    """
    if inputs is None or not isinstance(attention_mask, Tensor) or attention_mask.shape != inputs.shape[:2]:
        return None
    return attention_mask.reshape(-1).bool()


@contextlib.contextmanager
def _replacing_files(target: Path) -> Iterator[Path]:
    """A new folder next to `target`, whose files then replace those of the model there, config.json last."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.resolve().parent) as name:
        folder = Path(name)
        yield folder
        new = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for old in target.glob("*.safetensors*"):  # another number of shards has other names
            if _WEIGHTS.fullmatch(old.name) and old.relative_to(target) not in new:
                old.unlink()
        for path in sorted(new, key=lambda path: path.name == "config.json"):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / path, target / path)


def _is_composition(config_class: type[FlexMoeConfig], source: Any, config: Any, options: Mapping[str, Any]) -> bool:
    """Whether `from_pretrained(source, config=config, **options)` is asked for a composition."""
    if source is None or options.get("gguf_file"):
        return False
    if isinstance(config, PreTrainedConfig):
        return getattr(config, "composition", None) is not None
    hub = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
    try:
        values, _ = config_class.get_config_dict(source if config is None else config, **hub)
    except OSError:  # no config there, as next to an adapter: transformers handles or reports it
        return False
    return values.get("composition") is not None


def _check_loaded_experts(names: Sequence[str], info: Mapping[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Checks transformers' loading info: it would fill missing tensors at random and drop unexpected ones."""
    missing = _owners(info["missing_keys"]) & set(names)
    unknown = _owners(info["unexpected_keys"]) - set(names)
    if missing:
        example = sorted(key for key in info["missing_keys"] if _owners([key]) & missing)[0]
        raise ValueError(
            f"The checkpoint lacks tensors of the expert(s) {sorted(missing)}, which its config names: for example "
            f"{example!r}. It is incomplete, or its config.json belongs to another model."
        )
    if unknown:
        raise ValueError(
            f"The checkpoint holds tensors of {sorted(unknown)}, which its config does not name: it names "
            f"{list(names)}. Its config.json belongs to another model, or was edited: remove experts with "
            "`flexmoe remove`."
        )
    mismatched = sorted(info["mismatched_keys"])
    if of_experts := [entry for entry in mismatched if _owners([entry[0]])]:
        raise ValueError(
            f"The checkpoint's {_shapes(of_experts)}. An expert is loaded completely or not at all, also with "
            "ignore_mismatched_sizes: its config.json belongs to another model."
        )
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(
            f"The checkpoint's {_shapes(mismatched)}. Its config.json belongs to another model; "
            "ignore_mismatched_sizes=True initialises these tensors at random."
        )


def _shapes(mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    name, stored, expected = mismatched[0]
    more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
    return f"{name!r} has shape {list(stored)}, the config requires {list(expected)}{more}"


def _owners(keys: Iterable[str]) -> set[str]:
    return {match["name"] for key in keys if (match := _EXPERT_TENSOR.search(key))}


FlexMoeModel.register_for_auto_class("AutoModel")
FlexMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["FlexMoeCausalLMOutputWithPast", "FlexMoeForCausalLM", "FlexMoeModel", "FlexMoePreTrainedModel"]
