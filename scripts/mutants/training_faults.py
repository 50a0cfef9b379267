"""Faults of a training run: PEFT's wrappers bound to the kernels, gradients, LLaMA-Factory's hook."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_ACTIVE = "tests/integrations/peft/test_peft_active.py::"
_OPERANDS = "tests/numerics/test_expert_operands.py::"
_TRUTH = "tests/integrations/llamafactory/test_llamafactory_truth.py::"
_PEFT = "tests/integrations/peft/test_peft.py::"
_TARGETS = "tests/integrations/peft/test_peft_targets.py::"
_FORMATS = "tests/integrations/transformers/test_formats.py::"
_PARITY = "tests/models/test_parity.py::test_logits_and_all_gradients_match_plain_peft"
_LAYER = "tests/numerics/test_routed_experts.py::"
_GRADIENTS = "tests/numerics/test_moe_gradients.py::"
_PROPERTIES = "tests/numerics/test_moe_properties.py::"
_ARGS = "tests/integrations/llamafactory/test_llamafactory_args.py::"
_RUNS = "tests/integrations/llamafactory/test_llamafactory.py::"
_HOOK = "tests/integrations/llamafactory/test_llamafactory_hook.py::"
_SMALL_DELTA = f"{_FORMATS}test_small_delta_survives_merging_into_rounded_weights[INT8-0.06]"
_PEFT_MERGE = f"{_PEFT}test_merged_experts_are_base_plus_delta_rounded_once[qwen3_moe]"

_BINDING = "kt_sft/integrations/peft/binding.py"
_EXPERT_LORA = "kt_sft/nn/expert_lora.py"
_EXPERTS = "kt_sft/nn/routed_experts.py"
_OPS = "kt_sft/autograd/moe.py"
_SETTINGS = "kt_sft/autograd/settings.py"
_ROUTES = "kt_sft/transfer/routes.py"
_SUBMIT_JOIN = "tests/numerics/test_submit_join.py::"
_STREAMS = "tests/operator/test_operator_streams.py::"
_HOOK_FILE = "kt_sft/integrations/llamafactory/hook.py"

FAULTS = (
    # --- PEFT's wrappers and the kernels
    Fault(
        "PEFT's scaling is ignored",
        _BINDING,
        "return float(self.wrapper.scaling[self.adapter])",
        "return 1.0",
        (f"{_PEFT}test_scale_and_rank_are_pefts_own",),
    ),
    Fault(
        "disable_adapter leaves expert LoRA on",
        _BINDING,
        "if wrapper.disable_adapters or wrapper.merged or",
        "if wrapper.merged or",
        (f"{_PEFT}test_disabled_adapter_is_the_base_model_exactly",),
    ),
    Fault(
        "a merged adapter is applied twice",
        _BINDING,
        "if wrapper.disable_adapters or wrapper.merged or",
        "if wrapper.disable_adapters or",
        (f"{_PEFT}test_merged_adapter_cannot_be_taken_out_again",),
    ),
    Fault(
        "an adapter that is not active computes",
        _BINDING,
        " or self.adapter not in wrapper.active_adapters:",
        ":",
        (f"{_ACTIVE}test_adapter_that_is_not_active_does_nothing",),
    ),
    Fault(
        "merging into the model drops the delta of down",
        _BINDING,
        'if "down_proj" in self.deltas:',
        "if False:",
        (_SMALL_DELTA,),
    ),
    Fault(
        "merging into the model drops the delta of gate and up",
        _BINDING,
        'if "gate_up_proj" in self.deltas:',
        "if False:",
        (_SMALL_DELTA,),
    ),
    Fault(
        "merging into the model exchanges gate and up",
        _BINDING,
        "gate_delta, up_delta = self.deltas",
        "up_delta, gate_delta = self.deltas",
        (_PEFT_MERGE,),
    ),
    Fault(
        "merging into the model forgets the scale",
        _BINDING,
        "Lora(a, b.mT, pair.scaling())",
        "Lora(a, b.mT, 1.0)",
        (_PEFT_MERGE,),
    ),
    Fault(
        "merging into the model adds expert 0's down to all",
        _BINDING,
        'self.deltas["down_proj"].delta(self.index)',
        'self.deltas["down_proj"].delta(0)',
        (_PEFT_MERGE,),
    ),
    Fault(
        "a delta is rounded before it is added",
        _BINDING,
        "down = (down.float() + self",
        "down = (down + self",
        (_PEFT_MERGE,),
        reason="the same: torch adds bf16 and f32 in f32",
    ),
    Fault(
        "a merge rounds twice: into rounded weights",
        _BINDING,
        "return origin\n",
        "return lambda: experts.unpack_expert(index)\n",
        (_SMALL_DELTA,),
    ),
    Fault(
        "safe_merge lets an expert through that is partly finite",
        _BINDING,
        "if not all(part.isfinite().all()",
        "if not any(part.isfinite().all()",
        (f"{_PEFT}test_safe_merge_of_a_broken_adapter_changes_nothing",),
    ),
    Fault(
        "factors that PEFT has replaced are not seen",
        _BINDING,
        "if _is_stale(self, experts.lora):",
        "if False:",
        (f"{_PEFT}test_weights_loaded_into_a_running_model_are_used",),
    ),
    Fault(
        "linear layers train without dropout",
        _BINDING,
        "nn.Dropout(dropout).train(",
        "nn.Dropout(0.0).train(",
        (f"{_PEFT}test_linear_layers_keep_the_users_dropout",),
    ),
    Fault(
        "placeholders stay parameters, which DDP would broadcast",
        _BINDING,
        "    bind_outside(model)\n    hide_placeholders(model)\n",
        "    bind_outside(model)\n",
        (f"{_PEFT}test_parameter_counts_are_those_of_plain_peft[qwen3_moe]",),
    ),
    Fault(
        "DDP leaves the gradients of expert LoRA to each process",
        _BINDING,
        "    peft_model.load_adapter = types.MethodType(load_adapter, peft_model)\n",
        "    peft_model.load_adapter = types.MethodType(load_adapter, peft_model)\n"
        "    mine = [name for name, _ in peft_model.named_parameters() if '.experts.' in name]\n"
        "    peft_model._ddp_params_and_buffers_to_ignore = mine\n",
        (f"{_TRUTH}test_two_processes_train_as_one_that_accumulates",),
    ),
    Fault(
        "experts train without dropout",
        "kt_sft/integrations/peft/injecting.py",
        "bind_experts(model, dropout=dropout)",
        "bind_experts(model)",
        (f"{_PEFT}test_dropout_equals_a_reference_with_the_same_mask",),
    ),
    Fault(
        "the dropout is not written beside the adapter",
        "kt_sft/integrations/peft/targets.py",
        "self.model_type, self.adapter_dropout, RUNNING_FORM",
        "self.model_type, None, RUNNING_FORM",
        (f"{_PEFT}test_saved_adapter_gives_equal_logits_in_plain_peft[qwen3_moe-0.1]",),
    ),
    Fault(
        "a router that is named is trained",
        "kt_sft/integrations/peft/targets.py",
        "for name in linears if _is_matched(config, name)], what=what)",
        "for name in linears if False], what=what)",
        (f"{_TARGETS}test_router_named_outright_stays_frozen",),
    ),
    Fault(
        "all-linear leaves the experts frozen",
        "kt_sft/integrations/peft/targets.py",
        "(shorthand and not by_parameter) or (expert_lora",
        "(expert_lora",
        (f"{_TARGETS}test_all_reaches_the_experts_and_never_the_router",),
    ),
    Fault(
        "DoRA on experts is computed as LoRA",
        "kt_sft/adapters/options.py",
        '"use_dora", _is_set, (RUN, TRAIN, LOAD)',
        '"use_dora", _is_set, (RUN, LOAD)',
        (f"{_TARGETS}test_refusals_are_one_line_and_come_first",),
    ),
    # --- the experts module and its factors
    Fault(
        "down is scaled as gate and up are",
        _EXPERT_LORA,
        "self.down.scaling() if self.down is not None else 0.0",
        "gate_up",
        (f"{_PEFT}test_scale_and_rank_are_pefts_own",),
    ),
    Fault(
        "factors that were written are not read again",
        _EXPERT_LORA,
        "(p.data_ptr(), p._version, sample)",
        "(p.data_ptr(),)",
        (f"{_LAYER}test_inference_sees_parameters_that_were_written",),
    ),
    Fault(
        "a hand-written step after backward is not seen",
        _EXPERT_LORA,
        "self._last, self._bound = _NO_OPERANDS, None",
        "pass",
        (f"{_OPERANDS}test_steps_between_the_sampled_values_are_seen_after_backward",),
    ),
    Fault(
        "dropout stays on in eval mode",
        _EXPERTS,
        "if self.training and self.lora.dropout > 0.0:",
        "if self.lora.dropout > 0.0:",
        (f"{_PEFT}test_dropout_is_seeded_and_off_in_eval",),
    ),
    Fault(
        "dropout masks repeat at every step",
        _EXPERTS,
        'int(torch.randint(0, 2**62, (), device="cpu").item())',
        "1",
        (f"{_PEFT}test_dropout_is_seeded_and_off_in_eval",),
    ),
    Fault(
        "training takes int8 activations",
        _EXPERTS,
        "(self.training or torch.is_grad_enabled())",
        "False",
        (f"{_FORMATS}test_auto_activations_are_int8_in_inference_only",),
    ),
    Fault(
        "changed biases are not read again",
        _EXPERTS,
        "self._biases is None or self._biases[0] != looks",
        "self._biases is None",
        (f"{_LAYER}test_biases_in_a_state_dict_take_effect_or_name_their_size",),
    ),
    # --- gradients
    Fault(
        "the router gets no gradient",
        _OPS,
        "None if wants.weights is None else deliver(found.dweights, *wants.weights)",
        "None",
        (f"{_LAYER}test_gradient_of_routing_weights_alone", f"{_PARITY}[qwen3_moe-scalar]"),
    ),
    Fault(
        "nothing flows back to the hidden states",
        _OPS,
        "deliver(found.dx, self.device, self.dtype) if wants.x else None",
        "None",
        (f"{_GRADIENTS}test_any_rank",),
    ),
    Fault(
        "the scale of LoRA is 1",
        _SETTINGS,
        "(a, b, scale) for (a, b), scale in",
        "(a, b, 1.0) for (a, b), scale in",
        (f"{_PEFT}test_scale_and_rank_are_pefts_own",),
    ),
    Fault(
        "gradients of the factors are rounded to bf16",
        _OPS,
        "deliver(gradient, factor.device, factor.dtype)",
        "deliver(gradient, factor.device, torch.bfloat16).to(factor.dtype)",
        (f"{_OPERANDS}test_gradients_of_f32_parameters_keep_their_bits",),
    ),
    Fault(
        "the last expert gets no gradient",
        _OPS,
        "        if self.lora.after_backward is not None:\n",
        "        [grad[-1].zero_() for grad in found.dlora if grad is not None]\n"
        "        if self.lora.after_backward is not None:\n",
        (f"{_GRADIENTS}test_any_rank",),
    ),
    Fault(
        "lora_b's gradient is not scaled",
        _OPS,
        "        if self.lora.after_backward is not None:\n",
        "        [grad.div_(self.lora.projections[2][2]) for grad in found.dlora[5:] if grad is not None]\n"
        "        if self.lora.after_backward is not None:\n",
        (f"{_GRADIENTS}test_any_rank",),
    ),
    Fault(
        "gate and up exchange halves of the shared factor b",
        _SETTINGS,
        "(gate_a, gate_b[..., :inter]), (gate_a, gate_b[..., inter:])",
        "(gate_a, gate_b[..., inter:]), (gate_a, gate_b[..., :inter])",
        (f"{_PARITY}[qwen3_moe-scalar]",),
    ),
    Fault(
        "backward does not know the biases",
        _OPS,
        "self.layer.inter),\n                dropout_seed=self.seed, bias=self.bias,",
        "self.layer.inter),\n                dropout_seed=self.seed, bias=None,",
        (f"{_GRADIENTS}test_biases",),
    ),
    Fault(
        "the setting of activations does not reach the kernels",
        _SETTINGS,
        '"rows": self.rows}',
        '"rows": "bf16"}',
        (f"{_FORMATS}test_int8_activations_reach_the_kernels_and_inference_equals_forward",),
    ),
    Fault(
        "masks of dropout do not depend on the seed",
        _OPS,
        "        self.seed = seed\n",
        "        self.seed = 1\n",
        (f"{_PEFT}test_dropout_equals_a_reference_with_the_same_mask",),
    ),
    # --- between submit and join
    Fault(
        "forward does not wait for its inputs",
        _OPS,
        "                arrived()\n            return ids",
        "                pass\n            return ids",
        (f"{_SUBMIT_JOIN}test_results_over_a_device_are_those_in_place_bitwise",),
    ),
    Fault(
        "backward does not wait for the output's gradient",
        _OPS,
        "                arrived()\n            self.layer.backward(",
        "                pass\n            self.layer.backward(",
        (f"{_SUBMIT_JOIN}test_results_over_a_device_are_those_in_place_bitwise",),
    ),
    Fault(
        "the caller waits for the kernels of backward",
        _OPS,
        "task_queue.submit if route.is_beside else",
        "task_queue.run_now if route.is_beside else",
        (f"{_SUBMIT_JOIN}test_other_work_runs_beside_the_kernels_in_both_directions",),
    ),
    Fault(
        "an input that was written before join is not seen",
        _OPS,
        "        if self._versions != ",
        "        if False and self._versions != ",
        (f"{_SUBMIT_JOIN}test_writing_an_input_between_submit_and_join_is_refused",),
    ),
    Fault(
        "two backwards share what is on its way",
        _OPS,
        "return torch._C._current_graph_task_id()",
        "return 0",
        (f"{_SUBMIT_JOIN}test_two_threads_may_go_back_through_one_graph",),
    ),
    Fault(
        "memory of an output is written before it was read",
        _ROUTES,
        "            piece.is_read = self._recorded()\n",
        "",
        (f"{_STREAMS}test_memory_of_an_output_is_written_again_after_it_was_read",),
    ),
    # --- LLaMA-Factory
    Fault(
        "lora_target all of LLaMA-Factory trains the router",
        _HOOK_FILE,
        "return adapters.all_linear(model, found) if has_experts(model) else found",
        "return found",
        (f"{_HOOK}test_all_is_every_linear_layer_but_the_router",),
    ),
    Fault(
        "names that routers alone bear stay in the target",
        "kt_sft/integrations/llamafactory/adapters.py",
        " if name not in frozen]",
        "]",
        (f"{_HOOK}test_all_is_every_linear_layer_but_the_router",),
    ),
    Fault(
        "use_kt runs stock code",
        _HOOK_FILE,
        "model_args.use_kt, model_args.kt_active = False, True",
        "model_args.use_kt, model_args.kt_active = False, False",
        (f"{_ARGS}test_good_configuration_switches_the_flags",),
    ),
    Fault(
        "unknown keys are accepted",
        _HOOK_FILE,
        "            args.check_known(",
        "            (lambda *_: None)(",
        (f"{_ARGS}test_refusal_is_one_line_with_the_names[unknown-words0]",),
    ),
    Fault(
        "ZeRO-3 is not refused before the deepspeed package is asked for",
        "kt_sft/integrations/llamafactory/args.py",
        "    if is_zero3(deepspeed):\n",
        "    if False:\n",
        (f"{_ARGS}test_refusal_is_one_line_with_the_names",),
    ),
    Fault(
        "a configuration that cannot work is accepted",
        _HOOK_FILE,
        "    settings = args.check(*groups)\n",
        "    settings = args.kt_config(model_args)\n",
        (f"{_ARGS}test_refusal_is_one_line_with_the_names",),
    ),
    Fault(
        "files are looked at after the data set is made",
        _HOOK_FILE,
        "    opened = check_inputs(model_args)\n",
        "    opened = None\n",
        (f"{_ARGS}test_refusal_is_one_line_with_the_names",),
    ),
    Fault(
        "an error of ours ends with status 1",
        "kt_sft/integrations/llamafactory/reporting.py",
        'leave(f"error: {cause}", 2)',
        'leave(f"error: {cause}", 1)',
        (f"{_ARGS}test_command_ends_with_one_line_and_status_2",),
    ),
    Fault(
        "a flag in quotes is on, whatever it says",
        "kt_sft/integrations/llamafactory/value_types.py",
        "isinstance(value, bool) or (type(value) is int and value in (0, 1))",
        "isinstance(value, bool | int | str)",
        ("tests/integrations/llamafactory/test_value_types.py::test_another_type_is_one_line_with_the_key",),
    ),
    Fault(
        "an empty name of a list means every module",
        "kt_sft/integrations/llamafactory/value_types.py",
        "elif key in _LISTS and not all(",
        "elif False and not all(",
        ("tests/integrations/llamafactory/test_value_types.py::test_another_type_is_one_line_with_the_key",),
    ),
    Fault(
        "a run without our kernels is planned with them",
        "kt_sft/integrations/llamafactory/planning.py",
        'elif not args.is_set(values, "use_kt"):',
        "elif False:",
        ("tests/placement/test_plan.py::test_a_run_without_our_kernels_is_not_planned",),
    ),
    Fault(
        "several GPUs train by nn.DataParallel",
        _HOOK_FILE,
        "use_one_gpu(training_args)",
        "pass",
        (f"{_RUNS}test_several_gpus_without_torchrun_are_one",),
    ),
    Fault(
        "device_map auto reaches the loader",
        _HOOK_FILE,
        'device_map = init_kwargs.pop("device_map", None)',
        'device_map = init_kwargs.get("device_map", None)',
        (f"{_RUNS}test_model_is_placed_on_one_device",),
    ),
    Fault(
        "kt_expert_lora false is overruled by the target",
        "kt_sft/integrations/llamafactory/args.py",
        'return True if config.expert_lora is None and "all" in',
        'return True if "all" in',
        (f"{_ARGS}test_expert_lora_follows_the_target_unless_set",),
    ),
    Fault(
        "chat merges the adapter",
        "kt_sft/integrations/llamafactory/adapters.py",
        "    model_args.use_kt = True\n",
        "",
        (f"{_HOOK}test_adapters_are_merged_for_export_and_below_a_new_one_only",),
    ),
    Fault(
        "a new adapter is made beside an old one that is not merged",
        "kt_sft/integrations/llamafactory/adapters.py",
        " or (is_trainable and finetuning_args.create_new_adapter)",
        "",
        (f"{_HOOK}test_adapters_are_merged_for_export_and_below_a_new_one_only",),
    ),
    Fault(
        "the log counts no experts",
        "kt_sft/integrations/llamafactory/adapters.py",
        "return kt_peft.count_parameters(model) if",
        "return stock(model) if",
        (f"{_HOOK}test_names_that_loading_uses_are_ours",),
    ),
)
