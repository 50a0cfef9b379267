"""Faults of adapters on disk, and of what is made of them: other forms, merged checkpoints, GGUF files."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_ADAPTERS = "tests/integration/test_adapters.py::"
_ADAPTER_FAULTS = "tests/integration/test_adapter_faults.py::"
_ADAPTER_DIR = "tests/integration/test_peft_adapter_dir.py::"
_SCALE_FILE = "tests/integration/test_adapter_scales.py::"
_MERGED_FILES = "tests/integration/test_merged_files.py::"
_MERGING = "tests/integration/test_merging.py::"
_EVERY_FORM = f"{_ADAPTERS}test_every_form_adds_the_same_to_every_weight"
_SCALES = f"{_ADAPTERS}test_scales_and_ranks_that_differ"
_MERGED = f"{_MERGING}test_hf_checkpoint_is_w_plus_delta_rounded_once"

FAULTS = (
    Fault(
        "rsLoRA's scale is taken for alpha / rank",
        "kt_sft/adapters/peft_config.py",
        "return alpha / math.sqrt(rank) if",
        "return alpha / rank if",
        (_SCALES, f"{_SCALE_FILE}test_scale_and_rank_of_every_target_are_pefts"),
    ),
    Fault(
        "rank_pattern is ignored",
        "kt_sft/adapters/peft_config.py",
        '_by_pattern(config.get("rank_pattern"), target, config["r"])',
        'config["r"]',
        (
            f"{_ADAPTERS}test_separate_gate_and_up_need_twice_the_rank[peft-0.18]",
            f"{_SCALE_FILE}test_scale_and_rank_of_every_target_are_pefts",
        ),
    ),
    Fault(
        "alpha_pattern is ignored",
        "kt_sft/adapters/peft_config.py",
        '_by_pattern(config.get("alpha_pattern"), target, config["lora_alpha"])',
        'config["lora_alpha"]',
        (f"{_SCALE_FILE}test_scale_and_rank_of_every_target_are_pefts",),
    ),
    Fault(
        "a key of a pattern fits names that only begin so",
        "kt_sft/adapters/patterns.py",
        'rf"(.*\\.)?({pattern})$"',
        'rf"(.*\\.)?({pattern})"',
        (f"{_SCALE_FILE}test_scale_and_rank_of_every_target_are_pefts",),
    ),
    Fault(
        "converted config still says rsLoRA",
        "kt_sft/adapters/peft_config.py",
        '"use_rslora": False,',
        "",
        (_SCALES,),
    ),
    Fault(
        "converted config without alpha_pattern",
        "kt_sft/adapters/peft_config.py",
        'config["alpha_pattern"] = _pattern(',
        'config["alpha_pattern"] = {} and _pattern(',
        (_SCALES,),
    ),
    Fault(
        "up's factors are taken from gate's rows",
        "kt_sft/adapters/fused.py",
        '"up": Lora(a, b[:, spec.up_rows]',
        '"up": Lora(a, b[:, spec.gate_rows]',
        (f"{_EVERY_FORM}[qwen3_moe]",),
    ),
    Fault(
        "gate is written into up's rows",
        "kt_sft/adapters/fused.py",
        "b[:, spec.gate_rows, : gate.rank] = gate.b",
        "b[:, spec.up_rows, : gate.rank] = gate.b",
        (f"{_EVERY_FORM}[qwen3_moe]",),
    ),
    Fault(
        "the factor a of up is dropped where gate's is another",
        "kt_sft/adapters/fused.py",
        "(gate.scale == up.scale and _same(gate.a, up.a))",
        "gate.scale == up.scale",
        (f"{_ADAPTERS}test_separate_gate_and_up_need_twice_the_rank[peft-0.18]",),
    ),
    Fault(
        "modules trained as a whole get lost in conversion",
        "kt_sft/adapters/fused.py",
        "yield from whole_tensors(adapter)",
        "yield from ()",
        (
            f"{_ADAPTER_FAULTS}test_modules_trained_as_a_whole_are_compared_with_the_model",
            f"{_ADAPTER_FAULTS}test_stored_base_layer_of_a_module_with_lora",
        ),
    ),
    Fault(
        "layers keep ranks of their own",
        "kt_sft/adapters/fused.py",
        "    _level(ranks)\n",
        "",
        (f"{_SCALE_FILE}test_layers_of_different_ranks_load_in_stock_peft",),
        reason="the same product: levelling pads with zeros, for a shorter rank_pattern",
    ),
    Fault(
        "every expert gets the factor of expert 0",
        "kt_sft/adapters/per_expert.py",
        "Lora(lora.a[expert], lora.b[expert], lora.scale)",
        "Lora(lora.a[expert], lora.b[0], lora.scale)",
        (f"{_EVERY_FORM}[qwen3_moe]",),
    ),
    Fault(
        "SGLang's names of gate and up are exchanged",
        "kt_sft/adapters/per_expert.py",
        '"gate_proj": "gate", "up_proj": "up"',
        '"gate_proj": "up", "up_proj": "gate"',
        (
            f"{_ADAPTERS}test_model_loads_every_form[sglang]",
            f"{_SCALE_FILE}test_names_that_are_not_the_checkpoints_own",
        ),
    ),
    Fault(
        "an expert with half a pair is accepted",
        "kt_sft/adapters/per_expert.py",
        '(("A", (rank, into)), ("B", (out, rank))):\n        key',
        '(("A", (rank, into)),):\n        key',
        (f"{_ADAPTER_FAULTS}test_damaged_adapters_give_one_clear_error",),
    ),
    Fault(
        "llama.cpp's alpha is taken for the scale",
        "kt_sft/adapters/gguf.py",
        "(alpha / rank if alpha else 1.0)",
        "(alpha if alpha else 1.0)",
        (f"{_EVERY_FORM}[mixtral]",),
    ),
    Fault(
        "alpha 0 of a GGUF adapter switches it off",
        "kt_sft/adapters/gguf.py",
        "(alpha / rank if alpha else 1.0)",
        "(alpha / rank)",
        (f"{_SCALE_FILE}test_gguf_alpha_of_zero_is_a_scale_of_one",),
    ),
    Fault(
        "q and k rows of a GGUF adapter keep llama.cpp's order",
        "kt_sft/adapters/gguf.py",
        "return Lora(a, turn(name)(b), scales[name])",
        "return Lora(a, b, scales[name])",
        (f"{_EVERY_FORM}[mixtral]", f"{_ADAPTERS}test_model_loads_every_form[gguf]"),
    ),
    Fault(
        "a GGUF adapter forgets scales that differ",
        "kt_sft/adapters/gguf.py",
        "lora.fitted(lora.rank, alpha / lora.rank)",
        "lora.fitted(lora.rank, lora.scale)",
        (_SCALES,),
    ),
    Fault(
        "another scale is put into b upside down",
        "kt_sft/adapters/model.py",
        "b.float() * (self.scale / scale)",
        "b.float() * (scale / self.scale)",
        (_SCALES,),
    ),
    Fault(
        "a merge forgets the scale",
        "kt_sft/adapters/model.py",
        "return self.scale * (b.float() @ a.float())",
        "return b.float() @ a.float()",
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "the scale of linear layers is 1",
        "kt_sft/adapters/plain.py",
        "= rank, peft_config.scale_of(self._config, named, rank)",
        "= rank, 1.0",
        (f"{_EVERY_FORM}[qwen3_moe]",),
    ),
    Fault(
        "a saved module of another shape is taken",
        "kt_sft/adapters/plain.py",
        "        if self._tensors.shape(key) != shape:",
        "        if len(self._tensors.shape(key)) != len(shape):",
        (f"{_ADAPTER_FAULTS}test_modules_trained_as_a_whole_are_compared_with_the_model",),
    ),
    Fault(
        "an adapter of another model type is loaded",
        "kt_sft/integrations/peft/adapter_dir.py",
        "    if here and there and here != there:",
        "    if False:",
        (f"{_ADAPTER_DIR}test_another_model_type",),
    ),
    Fault(
        "an adapter without a layer's tensors is loaded",
        "kt_sft/integrations/peft/adapter_dir.py",
        'yield f"{key} is missing", list(shape), "none"',
        "continue",
        ("tests/integration/test_adapter_gaps.py::test_missing_tensors_of_the_experts",),
    ),
    # --- merged checkpoints
    Fault(
        "kt-sft merge drops the delta of down",
        "kt_sft/integrations/merging.py",
        "for loras in self._experts[1] if projection in loras]",
        'for loras in self._experts[1] if projection in loras and projection != "down"]',
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "kt-sft merge drops the delta of up",
        "kt_sft/integrations/merging.py",
        "for loras in self._experts[1] if projection in loras]",
        'for loras in self._experts[1] if projection in loras and projection != "up"]',
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "kt-sft merge adds expert 0's delta to all",
        "kt_sft/integrations/merging.py",
        "loras[projection].delta(index)",
        "loras[projection].delta(0)",
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "kt-sft merge rounds the delta, too",
        "kt_sft/integrations/merging.py",
        "loras[projection].delta(index)",
        "loras[projection].delta(index).to(weight.dtype)",
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "kt-sft merge leaves linear layers as they are",
        "kt_sft/adapters/changes.py",
        "weight + adapter.read_linear(target).delta()",
        "weight + 0 * adapter.read_linear(target).delta()",
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "kt-sft merge reads the first adapter only",
        "kt_sft/integrations/merging.py",
        "[adapter.read_experts(name) for adapter in self.adapters]",
        "[adapter.read_experts(name) for adapter in self.adapters[:1]]",
        (f"{_MERGED_FILES}test_experts_get_the_sum_of_several_adapters",),
    ),
    Fault(
        "a layer gets the factors of the layer before",
        "kt_sft/integrations/merging.py",
        "if self._experts is None or self._experts[0] != name:",
        "if self._experts is None:",
        (f"{_MERGED}[qwen3_moe]",),
    ),
    Fault(
        "transposed experts are written as they are not",
        "kt_sft/integrations/merging.py",
        "return matrix.mT.contiguous() if part.is_transposed else matrix",
        "return matrix.reshape(matrix.mT.shape) if part.is_transposed else matrix",
        (f"{_MERGED}[gpt_oss]",),
    ),
    Fault(
        "gate and up change places in fused checkpoints",
        "kt_sft/integrations/merging.py",
        "spec.join_gate_up(gate, up)",
        "spec.join_gate_up(up, gate)",
        (f"{_MERGED}[gpt_oss]",),
    ),
    Fault(
        "a head that got a weight of its own is still called tied",
        "kt_sft/integrations/merging.py",
        "    if is_untied:\n",
        "    if False:\n",
        (f"{_MERGED_FILES}test_head_that_is_no_longer_the_embedding_is_not_called_tied",),
    ),
    Fault(
        "a merged checkpoint still says that it is quantised",
        "kt_sft/integrations/merging.py",
        'part.pop("quantization_config", None)',
        "pass",
        (f"{_MERGING}test_quantised_base_becomes_bf16",),
    ),
    Fault(
        "the config does not get the written dtype",
        "kt_sft/integrations/merging.py",
        'part[name] = str(dtype).removeprefix("torch.")',
        "pass",
        (f"{_MERGED_FILES}test_written_dtype_is_in_the_config_and_routing_biases_stay_f32",),
    ),
    Fault(
        "routing biases are rounded",
        "kt_sft/integrations/merging.py",
        'key.endswith("e_score_correction_bias")',
        'key.endswith("no such bias")',
        (f"{_MERGED_FILES}test_written_dtype_is_in_the_config_and_routing_biases_stay_f32",),
    ),
    Fault(
        "shards are larger than asked for",
        "kt_sft/integrations/merging.py",
        "if not groups or used_bytes + size > limit_bytes:",
        "if not groups or used_bytes > limit_bytes:",
        (f"{_MERGED_FILES}test_shards_are_as_large_as_asked",),
    ),
    Fault(
        "k rows of a merged GGUF are ordered by the heads of q",
        "kt_sft/integrations/gguf_merging.py",
        '"attn_k.weight": "num_key_value_heads"',
        '"attn_k.weight": "num_attention_heads"',
        (f"{_MERGING}test_gguf_bf16_is_the_merged_checkpoint[mixtral]",),
    ),
    Fault(
        "a merged GGUF has the router in bf16",
        "kt_sft/integrations/gguf_merging.py",
        '_FULL_PRECISION = ("ffn_gate_inp.weight", ',
        "_FULL_PRECISION = (",
        (f"{_MERGING}test_gguf_q8_0_blocks_are_ggmls[qwen3_moe]",),
    ),
    Fault(
        "a merged GGUF has expert 0 everywhere",
        "kt_sft/integrations/gguf_merging.py",
        "merged.matrix(module, expert, projection)",
        "merged.matrix(module, 0, projection)",
        (f"{_MERGING}test_gguf_bf16_is_the_merged_checkpoint[qwen3_moe]",),
    ),
)
