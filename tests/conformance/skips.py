"""The tests of transformers that are skipped on a FlexMoE, with the reasons. A skip that is not listed fails the run.

Keys are patterns of test names, because parametrized tests have several; a pattern that matches no test fails the run.
"""

_REFUSED = "loads a checkpoint without any weight; one that lacks an expert's is refused (modeling/test_loading.py)"

CANNOT_APPLY = {
    "test_can_init_all_missing_weights": _REFUSED,
    "test_model_weights_reload_no_missing_tied_weights": _REFUSED,
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "re-entrant checkpointing loses a router's gradients, so it is refused (modeling/test_forward.py)"
    ),
}
"""Tests that FlexMoE skips: it refuses by design what they do."""

_GPU = "needs a GPU"
_OTHER_TASK = "a pipeline or head for another task: a FlexMoE is a causal language model"
_COMPOSITE = "needs sub-models with their own attention; a FlexMoE has one anchor"
_STACKED = "is about experts stacked in one tensor; a FlexMoE has one module per expert"
_TINY_MODELS = "loads a tiny model of this class from the Hub, which has none (modeling/test_pipeline.py)"
_FOUR = "needs 4 processor cores"

LEFT_OUT_BY_TRANSFORMERS = {
    # depends on the machine
    "test_eager_matches_fa?_generate": _GPU,
    "test_flash_attention*": _GPU,
    "test_flash_attn*": _GPU,
    "test_flex_attention_with_grads": _GPU,
    "test_can_load_with_*": _GPU,
    "test_cpu_offload": f"{_GPU} (modeling/test_devices.py)",
    "test_disk_offload_*": f"{_GPU} (modeling/test_devices.py)",
    "test_sdpa_can_*_flash*": _GPU,
    "test_sdpa_can_compile_dynamic": _GPU,
    "test_model_parallel*": "needs several GPUs",
    "test_kernels_*": "needs the kernels library",
    "test_generate_with_quant_cache": "needs optimum-quanto",
    "test_tp_generation_quantized": "needs torchao",
    "test_resize_*_with_deepspeed*": "needs deepspeed",
    "test_hsdp_save_load*": _FOUR,
    "test_hsdp_grad_accumulation_vs_single_device_0_*": _FOUR,
    # slow: run with RUN_SLOW=1
    "test_eager_matches_sdpa_generate": "slow (modeling/test_decoding.py)",
    "test_torch_compile_for_training": "slow (soak/test_compilation.py)",
    "test_torch_export_*": "slow (modeling/test_library.py)",
    "test_executorch_export_*": "slow, and needs executorch",
    "test_onnx_export_*": "slow, and needs onnx",
    # not for causal language models
    "test_pipeline_feature_extraction_*": _TINY_MODELS,
    "test_pipeline_text_generation_*": _TINY_MODELS,
    "test_pipeline_*": _OTHER_TASK,
    "test_question_answering_model": _OTHER_TASK,
    "test_sequence_classification_model*": _OTHER_TASK,
    "test_token_classification_model": _OTHER_TASK,
    "test_encoder_decoder_loss_no_double_shift": _OTHER_TASK,
    "test_vision_axial_rope": _OTHER_TASK,
    "test_attn_implementation_composite_models": _COMPOSITE,
    "test_can_set_attention_dynamically_composite_model": _COMPOSITE,
    "test_sdpa_can_dispatch_composite_models": _COMPOSITE,
    # features that these anchors do not have
    "test_model_rope_with_partial_rotation": "these anchors rotate every dimension",
    "test_recurrent_layers_mask_padding_on_continued_forward": "these anchors have no recurrent layers",
    "test_sliding_window_mask": "these anchors have no sliding window",
    "test_generate_with_mtp": "these anchors predict one token at a time",
    "test_resize_position_vector_embeddings": "these anchors have no table of positions",
    "test_can_load_from_already_mapped_keys": "tensors are stored under their own names",
    "test_reverse_loading_mapping": "tensors are stored under their own names",
    # specific to the MoE models of transformers
    "test_eager_matches_batched_and_grouped_inference_*": _STACKED,
    "test_moe_models_record_router_logits": f"{_STACKED} (modeling/test_forward.py)",
    "test_moe_parallel_plans_shard_experts": _STACKED,
    "test_fsdp2_expert_parallel_*": _STACKED,
    "test_hsdp_grad_accumulation_vs_single_device_2_*": _STACKED,
    "test_output_router_logits_from_config": (
        "looks for the option in the config of the anchor; it is in that of the FlexMoE (modeling/test_forward.py)"
    ),
}
"""Tests that transformers itself skips here."""
