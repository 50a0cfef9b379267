"""Faults of a run's life: who puts the adapter on, the canary, checkpoints, resuming, disks, references, data, keys."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_FOREIGN = "tests/integrations/peft/test_peft_foreign_calls.py::"
_COVERAGE = "tests/integrations/peft/test_peft_coverage.py::"
_KINDS = "tests/integrations/merge/test_merging_kinds.py::"
_CANARY = "tests/integrations/canary/test_canary.py::"
_INERT = f"{_CANARY}test_an_inert_run_stops_with_one_line_that_names_the_module"
_RESUMING = "tests/integrations/llamafactory/test_resuming.py::"
_SAVING = "tests/integrations/llamafactory/test_saving_aside.py::"
_REFERENCES = "tests/integrations/transformers/test_reference_models.py::"
_INPUTS = "tests/integrations/llamafactory/test_llamafactory_inputs.py::"
_PEER = "tests/integrations/llamafactory/test_peer_keys.py::"
_REMOTE = "tests/integrations/transformers/test_remote_code.py::"

_OUTSIDE = "kt_sft/integrations/peft/outside.py"
_INJECTING = "kt_sft/integrations/peft/injecting.py"
_COVERAGE_FILE = "kt_sft/integrations/peft/coverage.py"
_RELOADING = "kt_sft/integrations/peft/reloading.py"
_CANARY_FILE = "kt_sft/integrations/canary/callback.py"
_ROOM = "kt_sft/integrations/llamafactory/"
_RESUMING_FILE = f"{_ROOM}resuming.py"
_SAVING_FILE = f"{_ROOM}saving.py"
_DISK = f"{_ROOM}disk.py"
_REFERENCES_FILE = f"{_ROOM}references.py"
_DATA = f"{_ROOM}data_checks.py"
_PEER_FILE = f"{_ROOM}peer_keys.py"

FAULTS = (
    # --- layers of PEFT outside the experts, and its own calls
    Fault(
        "a router that is read as a weight never sees its LoRA",
        _OUTSIDE,
        "_ROUTERS = {LoraLinear: RouterLinear,",
        "_ROUTERS = {LoraLinear: LoraLinear,",
        (f"{_KINDS}test_router_that_is_read_as_a_weight_trains",),
    ),
    Fault(
        "a router's LoRA cannot be switched off",
        _OUTSIDE,
        "if self.disable_adapters or self.merged:",
        "if self.merged:",
        (f"{_KINDS}test_router_that_is_read_as_a_weight_trains",),
    ),
    Fault(
        "merging a head into the model changes the tied embedding",
        _OUTSIDE,
        "base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)",
        "pass",
        (f"{_KINDS}test_merge_and_unload_is_what_merge_writes",),
    ),
    Fault(
        "PEFT's own get_peft_model leaves the experts unbound",
        _INJECTING,
        "BaseTuner.inject_adapter, PeftModel.__init__ = inject_adapter, init",
        "BaseTuner.inject_adapter, PeftModel.__init__ = stock_inject, init",
        (f"{_FOREIGN}test_pefts_own_calls_bind_the_experts_as_ours_does",),
    ),
    Fault(
        "PEFT's own from_pretrained forgets the dropout",
        _INJECTING,
        "PeftModel.from_pretrained = classmethod(from_pretrained)",
        "pass",
        (f"{_FOREIGN}test_saved_by_pefts_own_way_it_loads_with_its_dropout",),
    ),
    Fault(
        "a second adapter on the experts is accepted",
        _INJECTING,
        "    if present:\n        raise",
        "    if False:\n        raise",
        (f"{_FOREIGN}test_second_adapter_with_the_same_config_object_is_refused",),
    ),
    Fault(
        "what was asked and does not train is not looked at",
        _INJECTING,
        "coverage.check(model, prepared, adapter_name)",
        "pass",
        (f"{_COVERAGE}test_what_was_asked_and_does_not_train_is_an_error",),
    ),
    Fault(
        "nothing says what trains",
        _INJECTING,
        "coverage.log(model, coverage.asked(config, expert_lora))",
        "pass",
        (f"{_COVERAGE}test_one_line_says_what_was_asked_and_what_trains",),
    ),
    Fault(
        "shared experts are counted as dense layers",
        _COVERAGE_FILE,
        'if any("shared" in part for part in parts):',
        "if False:",
        (f"{_COVERAGE}test_one_line_says_what_was_asked_and_what_trains",),
    ),
    Fault(
        "a saved adapter without some tensors is loaded over the one in use",
        _RELOADING,
        "    if lacking or further:\n",
        "    if further:\n",
        (f"{_RESUMING}test_more_targets_than_the_checkpoint_has",),
    ),
    Fault(
        "load_adapter does not compare with the adapter in use",
        _RELOADING,
        "        if adapter_name in peft_model.peft_config:\n",
        "        if False:\n",
        (f"{_RESUMING}test_other_lora_settings_are_refused_before_loading_and_while_loading",),
    ),
    Fault(
        "load_adapter reads other forms as they are",
        _RELOADING,
        "    with in_running_form(bare, source) as folder:\n",
        "    with in_running_form(bare, source):\n        folder = source\n",
        (f"{_RESUMING}test_load_adapter_converts_on_a_model_that_carries_one",),
    ),
    # --- the canary
    Fault(
        "the canary never fires",
        _CANARY_FILE,
        "        watch.check(state.global_step)\n",
        "",
        (_INERT,),
    ),
    Fault(
        "weight decay is training enough for the canary",
        _CANARY_FILE,
        "trains = changed if part.has_gradient is None else changed & part.has_gradient",
        "trains = changed",
        (_INERT,),
    ),
    Fault(
        "the canary looks at gradients only, not at what the optimiser did",
        _CANARY_FILE,
        "trains = changed if part.has_gradient is None else changed & part.has_gradient",
        "trains = changed if part.has_gradient is None else part.has_gradient",
        (f"{_CANARY}test_an_optimizer_without_the_experts_stops_the_run",),
    ),
    Fault(
        "the canary passes an adapter whose switch does nothing",
        _CANARY_FILE,
        "        if comparison.inert:\n",
        "        if False:\n",
        (_INERT,),
    ),
    Fault(
        "the canary passes a loss that ignores the model",
        _CANARY_FILE,
        "if (is_cut_off or is_idle) and not part.may_rest:",
        "if False:",
        (f"{_CANARY}test_a_loss_that_ignores_the_model_stops_the_run",),
    ),
    Fault(
        "experts without tokens stop the run",
        _CANARY_FILE,
        "expected = seen.experts if seen.experts is not None",
        "expected = torch.ones_like(seen.experts) if seen.experts is not None",
        (f"{_CANARY}test_experts_without_tokens_are_excepted_and_counted",),
    ),
    Fault(
        "the canary leaves the model in eval mode",
        "kt_sft/integrations/canary/probe.py",
        "                module.training = mode\n",
        "                pass\n",
        (f"{_CANARY}test_a_resumed_adapter_with_a_frozen_part_passes",),
    ),
    Fault(
        "LLaMA-Factory's runs have no canary",
        f"{_ROOM}trainer.py",
        "trainer.add_callback(Canary())",
        "pass",
        (
            "tests/integrations/llamafactory/test_llamafactory_targets.py::test_every_run_says_once_what_trains_and_has_the_canary",
        ),
    ),
    # --- checkpoints
    Fault(
        "a state of another kind of optimizer is taken",
        f"{_ROOM}resuming.py",
        "        _check_kind(checkpoint, state, training_args)\n",
        "        pass\n",
        (f"{_RESUMING}test_another_kind_of_optimizer_is_refused",),
    ),
    Fault(
        "a half-written checkpoint is resumed",
        "kt_sft/formats/training_checkpoint.py",
        "        if fault is None:\n",
        "        if True:\n",
        (f"{_RESUMING}test_which_checkpoint_is_taken",),
    ),
    Fault(
        "a checkpoint that is named need not be whole",
        _RESUMING_FILE,
        "    if fault := training_checkpoint.find_fault(path):\n",
        "    if fault := None:\n",
        (f"{_RESUMING}test_which_checkpoint_is_taken",),
    ),
    Fault(
        "an optimizer state in another order is loaded",
        f"{_ROOM}trainer.py",
        "is_ordered=True",
        "is_ordered=False",
        (f"{_RESUMING}test_an_optimizer_state_in_another_order_is_refused_while_loading",),
    ),
    Fault(
        "an optimizer state of other shapes is loaded",
        _RESUMING_FILE,
        "if further := Counter(state.shapes.values()) - Counter(shapes):",
        "if further := Counter():",
        (f"{_RESUMING}test_an_optimizer_state_of_other_parameters_is_refused",),
    ),
    Fault(
        "an optimizer state of either layout is loaded",
        _RESUMING_FILE,
        "        _check_layout(checkpoint, run) if is_converted else None\n",
        "",
        (f"{_RESUMING}test_a_state_that_may_be_of_either_layout_is_refused",),
    ),
    Fault(
        "a checkpoint's adapter is not compared with the run's",
        _RESUMING_FILE,
        "            reloading.check_same_tensors(checkpoint, folder, run.shapes, run.config)\n",
        "            pass\n",
        (f"{_RESUMING}test_other_lora_settings_are_refused_before_loading_and_while_loading",),
    ),
    Fault(
        "a changed lora_alpha is taken without a word",
        _RESUMING_FILE,
        'for key in ("lora_alpha", "use_rslora"',
        'for key in ("use_rslora"',
        (f"{_RESUMING}test_what_differs_is_said_in_one_line",),
    ),
    Fault(
        "a checkpoint of ranks on CPUs cannot be loaded",
        f"{_ROOM}trainer.py",
        'location.startswith("cpu:")',
        'location == "cpu"',
        (f"{_RESUMING}test_loads_what_ranks_of_a_cpu_ask_for",),
    ),
    Fault(
        "what a killed process left gets the name of a checkpoint",
        _SAVING_FILE,
        "if not is_named and training_checkpoint.find_fault(path) is None:",
        "if not is_named:",
        (f"{_SAVING}test_a_process_that_dies_while_saving_leaves_no_checkpoint_of_that_name",),
    ),
    Fault(
        "a whole checkpoint that waits for its name is deleted",
        _SAVING_FILE,
        "                replace_folder(path, target)\n    if removes",
        "                pass\n    if removes",
        (f"{_SAVING}test_a_checkpoint_that_waited_for_its_name_gets_it",),
    ),
    Fault(
        "older checkpoints stay beyond the limit",
        _SAVING_FILE,
        "most, best = trainer.args.save_total_limit,",
        "most, best = None,",
        (f"{_SAVING}test_the_number_of_checkpoints_is_kept",),
    ),
    Fault(
        "the best checkpoint is named where it was staged",
        _SAVING_FILE,
        "            _point_to_best(trainer, run_folder, target)\n",
        "",
        (f"{_SAVING}test_the_best_checkpoint_is_named_kept_and_loaded",),
    ),
    Fault(
        "a full disk ends the run",
        _SAVING_FILE,
        "    if trainer.args.world_size > 1:\n        raise fault",
        "    if True:\n        raise fault",
        (f"{_SAVING}test_a_full_disk_costs_the_checkpoint_and_not_the_run",),
    ),
    Fault(
        "a save writes over the adapter in place",
        _INJECTING,
        '            given.arguments["save_directory"] = str(staging)\n',
        "",
        ("tests/formats/test_writing.py::test_stock_trainer_replaces_an_adapter_of_another_rank_in_one_step",),
    ),
    # --- disks
    Fault(
        "a full disk at the end loses the adapter",
        _DISK,
        "kept = _rescue(trainer)",
        "kept = None",
        (f"{_SAVING}test_a_full_disk_at_the_end_keeps_the_adapter_somewhere",),
    ),
    Fault(
        "room for the optimizer's state is not counted",
        _DISK,
        "num * (adapter_bytes + state_bytes) +",
        "num * adapter_bytes +",
        (f"{_RESUMING}test_room_is_counted_before_training",),
    ),
    Fault(
        "the checkpoint that is written before the oldest goes is not counted",
        _DISK,
        "min(planned, limit + 1)",
        "min(planned, limit)",
        (f"{_RESUMING}test_room_is_counted_before_training",),
    ),
    # --- reference models
    Fault(
        "a reference model computes with the policy's experts",
        _REFERENCES_FILE,
        "        setattr(copy, key, None)\n",
        "        pass\n",
        (f"{_REFERENCES}test_reference_computes_its_own_checkpoint",),
    ),
    Fault(
        "a reference of the same model forgets where its experts are",
        _REFERENCES_FILE,
        "            setattr(copy, key, getattr(policy, key))\n",
        "            pass\n",
        (f"{_REFERENCES}test_reference_of_the_same_model_has_the_policys_experts",),
    ),
    Fault(
        "memory is counted for the policy alone",
        _REFERENCES_FILE,
        "memory.check_together([policy.memory, reference.memory],",
        "memory.check_together([policy.memory],",
        (f"{_REFERENCES}test_refusal_is_one_line[one_fits-words6]",),
    ),
    # --- data sets, keys of others, code beside a checkpoint
    Fault(
        "an unknown template is found after the model is loaded",
        _DATA,
        "if data_args.template is not None and data_args.template not in templates:",
        "if False:",
        (f"{_INPUTS}test_refusal_is_one_line",),
    ),
    Fault(
        "columns that a data set lacks are found while it is read",
        _DATA,
        "    if missing:\n",
        "    if False:\n",
        (f"{_INPUTS}test_refusal_is_one_line",),
    ),
    Fault(
        "a template of another model passes if its marks are tokens",
        _DATA,
        "    if not foreign and marks & own:\n",
        "    if not foreign:\n",
        (f"{_INPUTS}test_a_template_of_another_family_is_named",),
    ),
    Fault(
        "keys of KTransformers without effect are dropped without a word",
        _PEER_FILE,
        'notes.append(f"{name}: no effect: {WITHOUT_EFFECT[key]}")',
        "pass",
        (f"{_PEER}test_a_mapping_is_read_and_what_has_no_effect_is_said",),
    ),
    Fault(
        "a key of KTransformers overrules ours without a word",
        _PEER_FILE,
        "if own.get(key) is not None and not _agree(key, own[key], value):",
        "if False:",
        (f"{_PEER}test_contradictions_and_unknown_keys",),
    ),
    Fault(
        "code beside a checkpoint goes before transformers' own class",
        "kt_sft/models/auto_class.py",
        "trusts = False if is_native else trust_remote_code",
        "trusts = trust_remote_code",
        (f"{_REMOTE}test_loading_takes_the_class_that_transformers_has",),
    ),
    Fault(
        "LLaMA-Factory reads configs with the code beside them",
        f"{_ROOM}native_classes.py",
        "return read_auto_config(model_args.model_name_or_path, **kwargs)",
        "return stock_config(model_args)",
        (f"{_REMOTE}test_llamafactory_trains_chats_exports_and_compares",),
    ),
)
