"""FlexMoE: a dense anchor of any family, with named experts where its feed-forward networks stood.

Attention, rotary embeddings, norms, caches and the head stay the anchor's own code. Does not cover adding and removing
experts (`lifecycle_flexmoe`), the block (`experts_flexmoe`), or where a family keeps its networks (`anchors_flexmoe`).
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import ModelOutput

from .adapters_flexmoe import AdapterWatch, refuse_wrapped
from .anchors_flexmoe import ANCHOR_PREFIX, NameMap, find_ffn_sites
from .configuration_flexmoe import PUBLIC, FlexMoeConfig, check_top_k
from .context_flexmoe import checkpoint_with_context, forward_scope, scoped_values
from .experts_flexmoe import FlexMoeBlock
from .identity_flexmoe import refresh_fingerprint
from .implementations_flexmoe import asked_for
from .lifecycle_flexmoe import ExpertLifecycle
from .loading_flexmoe import check_everyone_is_there
from .norms_flexmoe import norm_follows_each_ffn
from .parallel_flexmoe import PLANS, class_without_fsdp, is_sharded, plan_of_public
from .pulling_flexmoe import check_whole, load_arguments
from .quantization_flexmoe import warn_if_nothing_was_quantized
from .routing_flexmoe import load_balancing_loss, router_z_loss
from .selection_flexmoe import select_experts, stamp_cache
from .sharing_flexmoe import ModelSharing
from .trust_flexmoe import TrustPolicy


@dataclass
class FlexMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """transformers' MoE output, and the router z-loss (a scalar, with `output_router_logits=True`)."""

    z_loss: Tensor | None = None


class FlexMoePreTrainedModel(ModelSharing, ExpertLifecycle, AdapterWatch, PreTrainedModel):
    """What both models share: the tree, the context of a forward pass, loading and saving."""

    config: FlexMoeConfig
    base_model_prefix = "anchor"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # rows are tiny and decide everything; the second form is the one that quantisers read
    _keep_in_fp32_modules_strict = [r"router"]  # noqa: RUF012 - transformers' own declaration
    _keep_in_fp32_modules = [r".*\.router"]  # noqa: RUF012 - transformers' own declaration

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the anchor below is the library's own code and wants to be initialised as such."""
        return False

    def __init__(self, config: FlexMoeConfig) -> None:
        super().__init__(config)
        config.composition = None  # whatever it was loaded from, a model holds its weights
        self.anchor = AutoModelForCausalLM.from_config(config.anchor_config)
        sites = find_ffn_sites(self.anchor)
        self.anchor_names = NameMap(sites)
        if config.norm_topk_prob is None:
            config.norm_topk_prob = not norm_follows_each_ffn(config.anchor_config)
        for site in sites:
            site.put(self.anchor, FlexMoeBlock(site.ffn(self.anchor), config, site.index))
        self._start_lifecycle()
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        missing_experts: str = "error",
        policy: str | Path | TrustPolicy | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, and a composition's anchor and experts are pulled from where it says.

        An expert without its tensors, or tensors without their expert, is an error.

        Args:
            missing_experts: what to do with experts of a composition that can't be had, because their owners withdrew
                them or closed the door: "error" names them, "skip" leaves them out with a warning.
            policy: whose packages a composition may bring: a policy file, by default the one that the environment
                variable FLEXMOE_POLICY names.

        Raises: as `check_everyone_is_there` and `load_arguments`; ValueError if the folder holds another model, such
            as a dense anchor, or an expert package.
        """
        source = pretrained_model_name_or_path
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        with load_arguments(
            cls.config_class, source, config, kwargs, missing_experts=missing_experts, policy=policy
        ) as pulled:
            if pulled:
                model, info = super().from_pretrained(None, *args, **options, **pulled)
            else:
                model, info = super().from_pretrained(source, *args, config=config, **options)
        check_everyone_is_there(model.expert_names, info, ignore_mismatched_sizes)
        if pulled:
            check_whole(source, info)
            model.name_or_path = model.config.name_or_path = str(source)
        warn_if_nothing_was_quantized(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, tensors called as in the state dict; a modified anchor gets a new fingerprint.

        Raises:
            ValueError: PEFT has wrapped this model (`get_peft_model`), so its tensors have other names.
        """
        if not self._hf_peft_config_loaded:  # adapters of `add_adapter` are saved alone, without the model
            refuse_wrapped(self, kwargs.get("state_dict"))
            refresh_fingerprint(self, kwargs.get("state_dict"))
        # some families are stored under older names (GPT-NeoX's head), which streams could not match
        kwargs.setdefault("save_original_format", False)
        is_main_process = kwargs.get("is_main_process", args[0] if args else True)
        if class_without_fsdp(type(self)) is not type(self) and self.should_save_on_this_rank(is_main_process):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.save_code(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def save_code(cls, folder: str | Path) -> None:
        """Copies the files that this class is made of into `folder`, for loading with `trust_remote_code=True`."""
        custom_object_save(class_without_fsdp(cls), folder)

    def init_parallel_plans(self) -> None:
        """Gives every expert the plans of the anchor's network: tensor-parallel, and what else the family brings."""
        super().init_parallel_plans()
        public = {f"{name}.experts.{PUBLIC}": block.experts[PUBLIC] for name, block in self._named_blocks().items()}
        for kind in PLANS:
            setattr(self, kind, plan_of_public(getattr(self, kind), public, self.anchor_names))
        self._plan_for_experts()

    @classmethod
    def is_remote_code(cls) -> bool:
        """As transformers' own; False for the class that FSDP2 makes of a model's, whose file is PyTorch's."""
        return super().is_remote_code() and class_without_fsdp(cls) is cls

    @classmethod
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config: Any, mesh: Any) -> Any:
        """As transformers' own. ValueError: pipelines, whose later stages never see the experts that were chosen."""
        if mesh is not None and distributed_config.pp_size > 1:
            raise ValueError(
                f"pp_size={distributed_config.pp_size}: FlexMoE does not run as a pipeline of stages. Use tp_size or "
                "fsdp_size of DistributedConfig."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh)

    def gather_sharded_state_dict_for_save(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As transformers' own, which tells tied tensors by their memory; gathered, each has memory of its own."""
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

    @property
    def base_model(self) -> PreTrainedModel:
        """The anchor's decoder without its head; trainers that build their own loss call it."""
        return self.anchor.base_model

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

    @contextlib.contextmanager
    def _routed(
        self,
        inputs: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        expert_mask: Tensor | None,
        num_experts_per_tok: int | None,
        collect: bool,
    ) -> Iterator[dict[str, Any]]:
        """Runs one forward pass: who may take part, how many, and what is collected on the way."""
        k = check_top_k(self.config.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok)
        if not torch.compiler.is_compiling():
            self.check_adapters()
        batch = None if inputs is None else inputs.shape[0]
        selection = select_experts(self, batch, expert_mask)
        stamp = self._stamp(selection)
        stamp_cache(cache, stamp)
        values: dict[str, Any] = {
            "allowed": selection.names,
            "row_mask": selection.row_mask,
            "top_k": k,
            "renormalize": bool(self.config.norm_topk_prob),
            "implementation": asked_for(self.config),
        }
        if collect:
            values["router_logits"] = []
        if usage := scoped_values(self, "usage"):
            values["usage"] = usage
        if self._prepacked is not None:
            values["prepacked"] = self._prepacked
        values["token_mask"] = _token_mask(inputs, attention_mask)
        values["stamp"] = stamp
        with forward_scope(values):
            yield values


class FlexMoeModel(FlexMoePreTrainedModel):
    """The decoder: the tree of `FlexMoeForCausalLM` without its head, so that both name every tensor alike."""

    def post_init(self) -> None:
        """Takes the head off, then as transformers' own."""
        head = self.anchor.get_output_embeddings()
        names = {name for name, module in self.named_modules() if module is head}
        self.anchor.set_output_embeddings(None)
        self.anchor._is_hf_initialized = True  # all that the wrapper itself would initialise is its head
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
        output_router_logits: bool | None = None,
        expert_mask: torch.BoolTensor | None = None,
        num_experts_per_tok: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast | tuple:
        """As the anchor's decoder; `expert_mask` and `num_experts_per_tok` as in `FlexMoeForCausalLM.forward`."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        inputs = input_ids if input_ids is not None else inputs_embeds
        with self._routed(
            inputs, attention_mask, past_key_values, expert_mask, num_experts_per_tok, output_router_logits
        ) as values:
            out = self.anchor.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        return _returned(self, _moe_output(MoeModelOutputWithPast, out, values), return_dict)


class FlexMoeForCausalLM(FlexMoePreTrainedModel, GenerationMixin):
    """A causal language model of named experts around a dense anchor. Source: FlexOlmo, arXiv 2507.07024."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        expert_mask: torch.BoolTensor | None = None,
        num_experts_per_tok: int | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexMoeCausalLMOutputWithPast | tuple:
        """As the anchor's forward pass, and:

        Args:
            expert_mask: bool [batch, experts], True where a sequence may use an expert; columns in the order of
                `expert_names`. Holds on top of the active set and of `only_experts`.
            num_experts_per_tok: k of this call; the config's by default.
            output_router_logits: return `router_logits` (one [tokens, experts] per layer, -inf where not allowed),
                `aux_loss` (load balancing) and `z_loss`, and add both to `loss` with the config's coefficients.

        Raises:
            ValueError: a sequence is left without an expert, the mask has another shape, k is below 1, or the cache
                was filled by other experts.
            TypeError: the mask is not of dtype bool.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        inputs = input_ids if input_ids is not None else inputs_embeds
        with self._routed(
            inputs, attention_mask, past_key_values, expert_mask, num_experts_per_tok, output_router_logits
        ) as values:
            out = self.anchor(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        out = _moe_output(FlexMoeCausalLMOutputWithPast, out, values)
        self._add_router_losses(out, values)
        return _returned(self, out, return_dict)

    def _add_router_losses(self, out: FlexMoeCausalLMOutputWithPast, values: dict[str, Any]) -> None:
        if not out.router_logits:
            return
        aux_loss = load_balancing_loss(out.router_logits, values["top_k"], values["token_mask"])
        z_loss = router_z_loss(out.router_logits, values["token_mask"])
        if out.loss is not None:
            weighted = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
            out.loss = out.loss + weighted.to(out.loss.device)
        out.aux_loss, out.z_loss = aux_loss, z_loss

    def generate(self, *args: Any, experts: list[str] | list[list[str]] | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; `experts` names those that may take part.

        Args:
            experts: names for all prompts, or one list of names per prompt. Holds on top of the active set; beams and
                returned sequences inherit their prompt's.

        Raises:
            ValueError: an unknown name, an empty list, or lists or an `expert_mask` for another number of prompts.
            TypeError: `experts` is a string, or `expert_mask` no tensor of dtype bool.
            RuntimeError (in the other thread): experts are changed while this runs.
        """
        with self._while_generating():
            if (k := kwargs.get("num_experts_per_tok")) is not None:
                check_top_k(k)
            mask, prompts = kwargs.get("expert_mask"), _prompts(args, kwargs)
            # refused here, where rows are prompts: in the forward pass they are beams
            if mask is not None:
                select_experts(self, prompts, mask)
            if experts is not None:
                named = self._mask_of(experts, prompts)
                mask = kwargs["expert_mask"] = named if mask is None else named & mask.to(named.device)
                select_experts(self, prompts, mask)
            return super().generate(*args, **kwargs)

    def _mask_of(self, experts: list[str] | list[list[str]], prompts: int) -> Tensor:
        if isinstance(experts, str):
            raise TypeError(f"experts is a list of names, or one such list per prompt; got the string {experts!r}.")
        names = [name for name in experts if isinstance(name, str)]
        return self.expert_mask([names] * prompts if len(names) == len(experts) else experts)

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, but an assistant without experts drafts without a choice of them."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None and assistant.config.model_type != self.config.model_type:
            ours = ("expert_mask", "num_experts_per_tok")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The anchor's way, which families override; `generate` looks for `inputs_embeds` in this signature."""
        return self.anchor.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)


def _prompts(args: tuple, kwargs: dict[str, Any]) -> int:
    """Number of prompts in a call of `generate`."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompts = args[0] if args else next((value for value in named if value is not None), None)
    return 1 if prompts is None else len(prompts)


def _moe_output(cls: type[ModelOutput], out: ModelOutput, values: dict[str, Any]) -> Any:
    """The anchor's output as the library's MoE output (GPT-2 and others also return `cross_attentions`: dropped)."""
    stamp_cache(out.get("past_key_values"), values["stamp"])
    moe = cls(**{name: out[name] for name in out if name in cls.__dataclass_fields__})
    if values.get("router_logits"):
        moe.router_logits = tuple(values["router_logits"])
    return moe


def _returned(model: PreTrainedModel, out: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
    return out if (model.config.return_dict if return_dict is None else return_dict) else out.to_tuple()


def _token_mask(inputs: Tensor | None, attention_mask: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    """bool [tokens] that is False for padding, if the attention mask is the plain [batch, sequence] of this input.

    With a static cache it is not: `generate` hands over finished masks, one per kind of layer in families such as
    Gemma-2.
    """
    if inputs is None or not isinstance(attention_mask, Tensor) or attention_mask.shape != inputs.shape[:2]:
        return None
    return attention_mask.reshape(-1).bool()


FlexMoeModel.register_for_auto_class("AutoModel")
FlexMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["FlexMoeCausalLMOutputWithPast", "FlexMoeForCausalLM", "FlexMoeModel", "FlexMoePreTrainedModel"]
