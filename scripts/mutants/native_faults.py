"""Faults of the kernels: forward, backward, LoRA gradients, combine, packing; each needs a build of the library."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_GRADIENTS = "tests/numerics/test_moe_gradients.py::"
_FLOAT64 = f"{_GRADIENTS}test_output_and_gradients_match_float64"
_BITWISE = "tests/numerics/test_moe_bitwise.py::"
_PROPERTIES = "tests/numerics/test_moe_properties.py::"
_ERRORS = "tests/numerics/test_format_errors.py::"
_LINEAR = "tests/numerics/test_linear.py::"
_DROPOUT = "tests/integrations/peft/test_peft.py::test_dropout_equals_a_reference_with_the_same_mask"
_SEPARATE = "tests/adapters/test_adapters.py::test_separate_gate_and_up_compute_as_plain_matrices"

_FORWARD = "native/moe/expert_forward.cc"
_BACKWARD = "native/moe/expert_backward.cc"
_LORA_GRAD = "native/moe/lora_grad.cc"
_COMBINE = "native/moe/combine.cc"
_ROWS = "native/arch/elementwise_inl.h"
_MAPPED = "tests/numerics/test_expert_storage.py::test_mapped_and_copied_equal_packed_with_any_number_of_shards"

FAULTS = (
    Fault(
        "up is computed with gate's weights",
        _FORWARD,
        "  task.w = &weights.up;",
        "  task.w = &weights.gate;",
        (_FLOAT64,),
    ),
    Fault(
        "up's LoRA gets gate's x A^T",
        _FORWARD,
        "add_lora(pass, pass.xa_up, pass.lora.up",
        "add_lora(pass, pass.xa_gate, pass.lora.up",
        (_FLOAT64, _SEPARATE),
    ),
    Fault(
        "down has no LoRA",
        _FORWARD,
        "if (pass.lora.down.present() && shard == 0)\n      add_lora",
        "if (false)\n      add_lora",
        (_FLOAT64,),
    ),
    Fault(
        "every shard adds down's LoRA",
        _FORWARD,
        "if (pass.lora.down.present() && shard == 0)\n      add_lora",
        "if (pass.lora.down.present())\n      add_lora",
        (f"{_BITWISE}test_pools_agree_with_one_pool",),
    ),
    Fault(
        "the bias of down is left out",
        _FORWARD,
        "add_bias(pass, pass.input.bias.down",
        "add_bias(pass, nullptr",
        (f"{_GRADIENTS}test_biases",),
    ),
    Fault(
        "the bias of up is that of gate",
        _FORWARD,
        "add_bias(pass, pass.input.bias.up",
        "add_bias(pass, pass.input.bias.gate",
        (f"{_GRADIENTS}test_biases",),
    ),
    Fault(
        "rows in int8 get the scales of other tokens",
        _FORWARD,
        "pass.token_scales[pass.routing.row_token[row]]",
        "pass.token_scales[row % pass.input.tokens]",
        (_FLOAT64,),
    ),
    Fault(
        "a shard reads h from its beginning",
        _FORWARD,
        "task.a_offset = pass.experts.shards[shard].begin;",
        "task.a_offset = 0;",
        (f"{_BITWISE}test_pools_agree_with_one_pool",),
    ),
    Fault(
        "LoRA's x A^T is not scaled",
        _FORWARD,
        "scale_values(to, piece.rows() * view.rank, pass.scale_of(view));",
        "",
        (_FLOAT64,),
    ),
    Fault(
        "dropout does not scale what it keeps",
        "native/moe/pass.h",
        "return view.scale / (1.0f - dropout.p);",
        "return view.scale;",
        (_DROPOUT,),
    ),
    Fault(
        "both dropouts of an expert have one mask",
        "native/moe/dropout.h",
        "kInter = 2 }",
        "kInter = 1 }",
        (_DROPOUT,),
    ),
    Fault(
        "rows of one chunk have the masks of another",
        "native/moe/pass.h",
        "static_cast<uint64_t>(pair_begin + routing",
        "static_cast<uint64_t>(routing",
        (f"{_BITWISE}test_results_do_not_depend_on_chunks",),
    ),
    Fault(
        "experts are added without their routing weights",
        _COMBINE,
        "weighted ? pass.weight(row) : 1.0f",
        "1.0f",
        (_FLOAT64,),
    ),
    Fault(
        "the last shard is not added",
        _COMBINE,
        "for (int s = 1; s < pass.num_shards(); ++s)",
        "for (int s = 1; s + 1 < pass.num_shards(); ++s)",
        (f"{_BITWISE}test_pools_agree_with_one_pool",),
    ),
    Fault(
        "the gradient of down's input lacks LoRA",
        _BACKWARD,
        "if (pass.lora.down.present())\n    add_lora_input_grad",
        "if (false)\n    add_lora_input_grad",
        (_FLOAT64,),
    ),
    Fault(
        "dg and du lack the routing weight",
        _BACKWARD,
        "dh, pass.weight(row), cols",
        "dh, 1.0f, cols",
        (_FLOAT64,),
    ),
    Fault(
        "lora_a of down lacks the routing weight",
        _BACKWARD,
        "pass.dha[row * rank + r] * pass.weight(row);",
        "pass.dha[row * rank + r];",
        (_FLOAT64,),
    ),
    Fault(
        "lora_b of down lacks the routing weight",
        _BACKWARD,
        "pass.ha[row * rank + r] *= pass.weight(row);",
        "",
        (_FLOAT64,),
    ),
    Fault(
        "up's part of the shared lora_a is lost",
        _BACKWARD,
        "if (lora.shares_a()) project(lora.up, pass.du_rows, pass.dxa_gate, true);",
        "",
        (
            _FLOAT64,
            "tests/models/test_parity.py::test_logits_and_all_gradients_match_plain_peft[qwen3_moe-scalar]",
        ),
    ),
    Fault(
        "the gradient of up is written over that of gate",
        _BACKWARD,
        "    task.accumulate = true;\n",
        "",
        (_FLOAT64,),
    ),
    Fault(
        "the router's gradient lacks down's bias",
        _BACKWARD,
        "float sum = pass.dweight_bias == nullptr ? 0.0f : pass.dweight_bias[row];",
        "float sum = 0.0f;",
        (f"{_GRADIENTS}test_biases",),
    ),
    Fault(
        "the router's gradient lacks the last panel",
        _BACKWARD,
        "for (int64_t p = 0; p < panels; ++p) sum +=",
        "for (int64_t p = 0; p + 1 < panels; ++p) sum +=",
        (_FLOAT64,),
    ),
    Fault(
        "LoRA gradients are those of the last chunk",
        "native/moe/layer.cc",
        "pass.adds_lora_grads = begin > 0;",
        "pass.adds_lora_grads = false;",
        (f"{_BITWISE}test_results_do_not_depend_on_chunks",),
    ),
    Fault(
        "experts without rows have no zeros",
        _LORA_GRAD,
        "if (routing != nullptr && routing->offsets[e] < routing->offsets[e + 1]) return;",
        "if (routing != nullptr) return;",
        (f"{_PROPERTIES}test_expert_without_tokens_gets_zero_lora_grad",),
    ),
    Fault(
        "expert-minor factors of experts without rows have no zeros",
        _LORA_GRAD,
        "} else if (!pass.adds_lora_grads) {",
        "} else if (false) {",
        ("tests/numerics/test_routed_experts.py::test_gradients_do_not_depend_on_how_factors_are_stored",),
    ),
    Fault(
        "the last columns of a task are left out",
        _LORA_GRAD,
        "min_i64(kColumnsPerTask, factor.cols - col)",
        "min_i64(kColumnsPerTask, factor.cols - col) / 8 * 8",
        (f"{_GRADIENTS}test_random_shapes_match_the_rounding_model",),
    ),
    Fault(
        "the tail of a row is not added",
        _ROWS,
        "  if (j < cols) V::store_n(dst + j, cols - j, V::fma(s,",
        "  if (false) V::store_n(dst + j, cols - j, V::fma(s,",
        (_FLOAT64, f"{_GRADIENTS}test_random_shapes_match_the_rounding_model"),
    ),
    Fault(
        "the tail of a row is not rounded",
        _ROWS,
        "  if (j < cols) V::store_bf16_n(dst + j, cols - j, V::load_n(src + j, cols - j));",
        "  if (false) V::store_bf16_n(dst + j, cols - j, V::load_n(src + j, cols - j));",
        (
            f"{_LINEAR}test_bias_is_added_to_the_sums_before_the_one_rounding",
            f"{_LINEAR}test_operation_takes_every_float_dtype_and_any_leading_dimensions",
            f"{_GRADIENTS}test_input_dtypes_come_back",
        ),
    ),
    Fault(
        "the slope of SiLU lacks its second part",
        "native/arch/gates_inl.h",
        "*slope = V::mul(s, V::fma(g, V::sub(V::set1(1.0f), s), V::set1(1.0f)));",
        "*slope = s;",
        (_FLOAT64,),
    ),
    Fault(
        "h of the backward carries the routing weight",
        _ROWS,
        "dot = V::fma(dh_unweighted, h, dot);",
        "dot = V::fma(V::mul(dh_unweighted, scale), h, dot);",
        (_FLOAT64, f"{_PROPERTIES}test_zero_routing_weight_still_has_a_gradient"),
    ),
    Fault(
        "the last group of an INT4 row has the scale of the first",
        "native/gemm/pack.cc",
        "scales[(k + i) / group * kPanel] = f32_to_bf16(",
        "scales[(k + i + group >= packed.k ? 0 : (k + i) / group) * kPanel] = f32_to_bf16(",
        (f"{_ERRORS}test_int4_weights_are_the_best_candidate",),
    ),
    Fault(
        "stored INT4 scales of the last group are left out",
        "native/gemm/pack.cc",
        "    scales[g * kPanel] = from[g];",
        "    scales[g * kPanel] = from[g + 1 < groups ? g : 0];",
        ("tests/integrations/transformers/test_quantized_checkpoints.py::test_rawint4_holds_the_stored_numbers",),
    ),
    Fault(
        "an INT8 row that is cut into shards has a scale for each part",
        "native/gemm/pack.cc",
        "ops.largest(w - part.before, part.before + packed.k + part.after)",
        "ops.largest(w, packed.k)",
        ("tests/numerics/test_expert_storage.py::test_exported_bytes_do_not_depend_on_shards",),
    ),
    Fault(
        "shards of mapped INT8 experts have the sums of the first one",
        "native/store/expert_store.cc",
        "sum_columns(places[shard].down, panel, writable_sums(places[shard].down, panel));",
        "sum_columns(places[0].down, panel, writable_sums(places[shard].down, panel));",
        (_MAPPED,),
    ),
    Fault(
        "scales of a part of a matrix are those of its first columns",
        "native/gemm/pack_split.cc",
        "part.scales = whole.panel_scales(panel) + scales;",
        "part.scales = whole.panel_scales(panel);",
        (_MAPPED,),
    ),
    Fault(
        "sums of INT8 rows, which int8 activations need, are wrong",
        "native/gemm/pack.cc",
        "for (int64_t i = 0; i < padded; ++i) sum += q[i];",
        "for (int64_t i = 1; i < padded; ++i) sum += q[i];",
        (f"{_LINEAR}test_int8_rows_equal_float64_on_the_quantised_rows",),
    ),
    Fault(
        "kernels of few rows are taken for many",
        "native/gemm/tables.cc",
        "if (row.max_m > 0 && product.m > row.max_m) return",
        "if (false) return",
        ("tests/cli/test_kernel_choice.py::test_table_fits_a_terminal_of_80_columns",),
    ),
    Fault(
        "kernels that the user has narrowed away count as missing in the CPU",
        "native/gemm/tables.cc",
        "return (row.isa & detected) == 0 ? Refusal::kCpu : Refusal::kNarrowed;",
        "return Refusal::kCpu;",
        ("tests/cli/test_kernel_choice.py::test_every_row_of_the_table_is_chosen_dearer_or_out_for_a_reason",),
    ),
    Fault(
        "a linear layer forgets its bias",
        "native/linear/packed_linear.cc",
        "if (p.bias != nullptr) p.ops->scale_add(",
        "if (false) p.ops->scale_add(",
        (f"{_LINEAR}test_bias_is_added_to_the_sums_before_the_one_rounding",),
    ),
)
