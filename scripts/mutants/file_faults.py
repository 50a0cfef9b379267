"""Faults of what is read, written, placed and served: checkpoints, containers, rules, deferred experts, answers."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_LOADING = "tests/integrations/transformers/test_loading.py::"
_SAVING = "tests/integrations/transformers/test_saving.py::"
_QUANTIZED = "tests/integrations/transformers/test_quantized_checkpoints.py::"
_GGUF_MODEL = "tests/integrations/gguf/test_gguf_model.py::"
_CONVERT = "tests/convert/test_convert.py::"
_CONTAINER = "tests/formats/test_packed_container.py::"
_RESOLVE = "tests/placement/test_resolve.py::"
_DEFERRED = "tests/schedule/test_deferred.py::"
_ENGINE = "tests/serving/test_engine.py::"
_STOPS = "tests/serving/test_stop_strings.py::"
_SETTINGS = "tests/serving/test_chat_settings.py::"
_OPENAI = "tests/serving/test_openai_routes.py::"

FAULTS = (
    # --- loading
    Fault(
        "up is read from gate's rows of a fused tensor",
        "kt_sft/models/expert_keys.py",
        "self._gate_up(index, self.spec.up_rows)",
        "self._gate_up(index, self.spec.gate_rows)",
        (f"{_LOADING}test_packed_experts_hold_the_checkpoints_weights_exactly",),
    ),
    Fault(
        "every expert is expert 0",
        "kt_sft/models/expert_keys.py",
        "WeightSlice(self.single[projection, index])",
        "WeightSlice(self.single[projection, 0])",
        (f"{_LOADING}test_packed_experts_hold_the_checkpoints_weights_exactly",),
    ),
    Fault(
        "a turned matrix is read as it is stored",
        "kt_sft/models/expert_keys.py",
        "part = part.mT if self.is_transposed else part",
        "part = part.reshape(part.mT.shape) if self.is_transposed else part",
        (
            "tests/models/test_spec.py::test_orientation_of_fused_tensors_follows_their_shape",
            "tests/models/test_families.py::test_experts_of_both_layouts_are_those_of_the_stock_model",
        ),
    ),
    Fault(
        "rows of an FP8 matrix get the scales of its first block",
        "kt_sft/formats/quantized_index.py",
        "scale = scale[begin // block_rows : -(-wanted.stop // block_rows)].contiguous()",
        "scale = scale[: -(-(wanted.stop - begin) // block_rows)].contiguous()",
        ("tests/formats/test_loading_slices.py::test_any_rows_of_an_fp8_matrix_are_those_of_the_whole",),
    ),
    Fault(
        "experts of a stack share the scales of the first one",
        "kt_sft/formats/quantized_index.py",
        "value = matrix(name, (experts,), scale[experts], part)",
        "value = matrix(name, (experts,), scale[0], part)",
        (f"{_QUANTIZED}test_mxfp4_numbers_are_those_of_transformers", f"{_QUANTIZED}test_same_model_as_the_bf16_twin"),
    ),
    Fault(
        "halves of kv_b are joined the wrong way round",
        "kt_sft/formats/gguf_names.py",
        "torch.cat([k, v.reshape(values)], dim=1)",
        "torch.cat([v.reshape(values), k], dim=1)",
        (f"{_GGUF_MODEL}test_same_model_as_the_checkpoint[deepseek_v2 split kv_b]",),
    ),
    Fault(
        "q and k of a GGUF file keep llama.cpp's order",
        "kt_sft/formats/gguf_names.py",
        "make = unpermute(config[heads]) if heads else None",
        "make = None",
        (f"{_GGUF_MODEL}test_same_model_as_the_checkpoint[mixtral]",),
    ),
    Fault(
        "a model that does not fit is loaded",
        "kt_sft/memory.py",
        "    if needed.total_bytes <= available.bytes:\n        return\n",
        "    return\n",
        ("tests/unit/test_memory.py::test_check_says_needed_and_available_in_gib",),
    ),
    Fault(
        "all processes of a machine count as one",
        "kt_sft/memory.py",
        "self.ranks * (self.experts_bytes",
        "(self.experts_bytes",
        ("tests/unit/test_memory.py::test_estimate_adds_components_and_multiplies_by_processes",),
    ),
    # --- saving
    Fault(
        "a saved model has expert 0 everywhere",
        "kt_sft/integrations/transformers/saving.py",
        "if unpacked != (module, part.expert):",
        "if unpacked is None:",
        (f"{_SAVING}test_saved_checkpoint_equals_the_loaded_one",),
    ),
    Fault(
        "rounded experts are saved although the checkpoint is there",
        "kt_sft/integrations/transformers/saving.py",
        "        if origin is not None:\n",
        "        if False:\n",
        (
            "tests/integrations/transformers/test_formats.py::test_saved_checkpoint_is_the_one_loaded_not_its_rounded_form",
        ),
    ),
    Fault(
        "experts of an f32 model are saved in bf16",
        "kt_sft/integrations/transformers/saving.py",
        "dtype = model.dtype if model.dtype in (torch.float16, torch.float32) else",
        "dtype = model.dtype if False else",
        (f"{_SAVING}test_experts_are_saved_in_the_models_dtype",),
    ),
    Fault(
        "weight files of an earlier save stay",
        "kt_sft/formats/overwriting.py",
        "    dropped = _dropped(fresh, folder)\n",
        "    dropped = []\n",
        (f"{_SAVING}test_second_save_replaces_the_first_and_keeps_other_files",),
    ),
    Fault(
        "a model with an adapter is saved without it",
        "kt_sft/integrations/transformers/saving.py",
        "    _check_no_adapters(model)\n",
        "",
        (f"{_SAVING}test_model_with_adapters_is_refused",),
    ),
    # --- containers
    Fault(
        "a damaged blob is not seen",
        "kt_sft/formats/packed.py",
        "!= blob.crc32:",
        "!= zlib.crc32(data):",
        (
            f"{_CONTAINER}test_damaged_files_are_refused",
            f"{_CONVERT}test_verify_sees_weights_of_another_source",
            "tests/fuzz/test_doors.py::test_few_cases[container]",
        ),
    ),
    Fault(
        "a checkpoint edited behind its first MiB is taken for the same",
        "kt_sft/formats/source_hash.py",
        "if how == SOURCE_HASH and size <= _WHOLE_BYTES:\n        yield 0, size\n",
        "if how == SOURCE_HASH and size <= _WHOLE_BYTES:\n        yield 0, min(size, _END_BYTES)\n",
        ("tests/formats/test_source_digest.py::test_digest_of_a_source_follows_both_ends",),
    ),
    Fault(
        "a file of another layer is mapped",
        "kt_sft/formats/packed.py",
        "            if found != wanted:",
        "            if False:",
        (f"{_CONTAINER}test_swapped_files_are_refused",),
    ),
    Fault(
        "a changed manifest is believed",
        "kt_sft/formats/packed_manifest.py",
        'if self.get(values, "checksum", str, "") != _checksum(body):',
        "if False:",
        (f"{_CONTAINER}test_a_changed_manifest_is_refused_by_its_checksum",),
    ),
    Fault(
        "offsets of a manifest are believed",
        "kt_sft/formats/packed_manifest.py",
        "if values[0] != begin or values[1] != size:",
        "if False:",
        (f"{_CONTAINER}test_a_manifest_at_odds_with_itself_is_refused",),
    ),
    Fault(
        "a layer is announced before it is on the disk",
        "kt_sft/formats/staging.py",
        "        flush_file(stream)\n    os.replace(part, target)",
        "    os.replace(part, target)",
        (f"{_CONVERT}test_nothing_is_announced_before_it_is_on_the_disk",),
    ),
    Fault(
        "a cut layer counts as finished",
        "kt_sft/convert/run.py",
        " and _has_size(plan.output / layer.file, layer.file_bytes):",
        ":",
        (f"{_CONVERT}test_a_damaged_journal_or_layer_is_done_again",),
    ),
    Fault(
        "two processes write to one folder",
        "kt_sft/convert/folder.py",
        "held = lock.acquire()",
        "held = contextlib.nullcontext()",
        (f"{_CONVERT}test_two_processes_do_not_write_to_one_folder",),
    ),
    Fault(
        "a conversion of other source files goes on with the old layers",
        "kt_sft/convert/plan.py",
        "what = [LAYOUT_ID, self.format, self.group, self.model_type, files, shapes]",
        "what = [LAYOUT_ID, self.format, self.group, self.model_type, shapes]",
        (f"{_CONVERT}test_other_settings_or_another_source_do_not_resume",),
    ),
    # --- placement
    Fault(
        "the last matching rule decides",
        "kt_sft/placement/resolve.py",
        "        return matching[0]\n",
        "        return matching[-1]\n",
        (f"{_RESOLVE}test_first_matching_rule_decides",),
    ),
    Fault(
        "a rule that is not recursive leaves what is below to others",
        "kt_sft/placement/resolve.py",
        "None if rule.recursive else rule.number",
        "None",
        (f"{_RESOLVE}test_a_rule_that_is_not_recursive_stops_the_others",),
    ),
    Fault(
        "tied weights may be on two devices",
        "kt_sft/placement/resolve.py",
        "if len({placement.device for placement in placed}) > 1:",
        "if False:",
        (f"{_RESOLVE}test_tied_weights_stay_together",),
    ),
    Fault(
        "parts of the layers overlap by one",
        "kt_sft/placement/rules.py",
        "num_layers * self.first // self.parts)",
        "num_layers * self.first // self.parts + 1)",
        ("tests/placement/test_rules.py::test_parts_of_the_layers_are_all_of_them_in_order",),
    ),
    Fault(
        "one method for all layers although rules name several",
        "kt_sft/placement/inject.py",
        "    return config, methods\n",
        "    return config, {}\n",
        ("tests/integrations/transformers/test_placement.py::test_layers_have_their_formats_and_logits_follow_them",),
    ),
    Fault(
        "a device that the machine lacks is accepted",
        "kt_sft/placement/inject.py",
        "if int(number) >= count:",
        "if int(number) > count:",
        ("tests/placement/test_placed_devices.py::test_devices_are_counted_from_zero",),
    ),
    Fault(
        "plan counts a tied weight twice",
        "kt_sft/placement/budget.py",
        "            seen.add(id(tensor))\n",
        "",
        ("tests/placement/test_placed_devices.py::test_a_tied_weight_is_counted_once",),
    ),
    # --- deferred experts
    Fault(
        "the experts with the largest weights are deferred",
        "kt_sft/schedule/deferred.py",
        ".argsort(dim=1, stable=True)[:, :count]",
        ".argsort(dim=1, stable=True, descending=True)[:, :count]",
        (f"{_DEFERRED}test_the_lowest_weights_among_the_experts_here_are_deferred",),
    ),
    Fault(
        "deferred output is dropped",
        "kt_sft/schedule/deferred.py",
        "total += before.result()",
        "before.result()",
        (f"{_DEFERRED}test_deferred_output_is_added_to_the_next_layer_and_the_last_defers_nothing",),
    ),
    Fault(
        "deferred output of other tokens is added",
        "kt_sft/schedule/deferred.py",
        "or found[0]() is not layer or found[1] != tokens:",
        "or found[0]() is not layer:",
        (f"{_DEFERRED}test_a_pass_of_other_tokens_does_not_get_what_an_aborted_one_left",),
    ),
    Fault(
        "deferred output is taken twice",
        "kt_sft/schedule/deferred.py",
        "        self._on_its_way.found = None\n",
        "",
        (f"{_DEFERRED}test_output_is_taken_once",),
    ),
    # --- serving
    Fault(
        "the text ends before the last stop string",
        "kt_sft/serving/text.py",
        "return text[: min(found)]",
        "return text[: max(found)]",
        (f"{_STOPS}test_text_ends_before_the_first_of_several_stop_strings_in_one_token",),
    ),
    Fault(
        "the beginning of a stop string is shown",
        "kt_sft/serving/text.py",
        "keep = max((_overlap(text, word) for word in self._stop), default=0)",
        "keep = 0",
        (f"{_ENGINE}test_nothing_of_a_stop_string_is_shown_early",),
    ),
    Fault(
        "what was held back is lost at the end",
        "kt_sft/serving/text.py",
        'rest, self._held = text + self._held, ""',
        'rest, self._held = text, ""',
        (f"{_ENGINE}test_text_ends_before_a_stop_string",),
    ),
    Fault(
        "who came last has the next turn",
        "kt_sft/serving/turns.py",
        "self._waiting.popleft().release()",
        "self._waiting.pop().release()",
        (f"{_ENGINE}test_turns_come_in_order_of_arrival",),
    ),
    Fault(
        "the first token is not counted",
        "kt_sft/serving/engine.py",
        "            generation.completion_tokens += 1\n",
        "            generation.completion_tokens += timing.first_token is not None\n",
        (f"{_ENGINE}test_numbers_of_an_answer",),
    ),
    Fault(
        "an answer that a stop string ended says that it was too long",
        "kt_sft/serving/engine.py",
        '"stop" if text.stopped else reason',
        "reason",
        (f"{_STOPS}test_an_answer_that_a_stop_string_ended_says_so",),
    ),
    Fault(
        "answers wait for Nagle's delay",
        "kt_sft/serving/server.py",
        "socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)",
        "socket.socket(family, socket.SOCK_STREAM)",
        ("tests/serving/test_connections.py::test_answers_are_not_held_back",),
    ),
    Fault(
        "pages of other servers may ask without a key",
        "kt_sft/serving/access.py",
        "if any(origin.lower() not in",
        "if False and any(origin.lower() not in",
        ("tests/serving/test_access.py::test_pages_of_other_servers_are_refused",),
    ),
    Fault(
        "any name in Host is answered without a key",
        "kt_sft/serving/access.py",
        "        return address.is_loopback or self.addresses\n",
        "        return True\n",
        ("tests/serving/test_access.py::test_names_of_a_server_follow_its_address",),
    ),
    Fault(
        "what follows a refused body is a request",
        "kt_sft/serving/access.py",
        'app.headers["Connection"] = "close"',
        "pass",
        ("tests/serving/test_connections.py::test_what_follows_a_refused_body_is_no_request",),
    ),
    Fault(
        "a long prompt is tokenised before it is counted",
        "kt_sft/serving/intake.py",
        "if num_chars > self._context * SURE_CHARS_PER_TOKEN:",
        "if False:",
        ("tests/serving/test_bodies.py::test_prompts_beyond_the_context_are_never_tokenised_as_a_whole",),
    ),
    Fault(
        "a name may occur twice in an object",
        "kt_sft/formats/json_object.py",
        "if len(values) != len(pairs):",
        "if len(values) > len(pairs):",
        ("tests/serving/test_bodies.py::test_json_that_is_none_or_too_much_is_refused_at_once",),
    ),
    Fault(
        "the end of a header is waited for without an end",
        "kt_sft/serving/connection.py",
        "if kind is None or waited < LIMITS_S[kind]:",
        "if kind in (None, 'header') or waited < LIMITS_S[kind]:",
        ("tests/serving/test_connections.py::test_header_that_does_not_end_is_not_waited_for",),
    ),
    Fault(
        "tiny temperatures divide scores beyond float32",
        "kt_sft/integrations/llamafactory/chat.py",
        'if (values["temperature"] or 0.0) < MIN_TEMPERATURE:',
        'if not values["temperature"]:',
        (f"{_SETTINGS}test_small_temperatures_take_the_most_likely_token",),
    ),
    Fault(
        "a request with a temperature is answered greedily",
        "kt_sft/integrations/llamafactory/chat.py",
        'values["do_sample"] = True',
        'values["do_sample"] = False',
        (f"{_SETTINGS}test_settings_of_a_request_reach_generation",),
    ),
    Fault(
        "top_k of a request is ignored",
        "kt_sft/integrations/llamafactory/chat.py",
        '            "top_k": sampling.top_k,\n',
        "",
        (f"{_SETTINGS}test_settings_of_a_request_reach_generation",),
    ),
    Fault(
        "the frequency penalty counts a token once",
        "kt_sft/integrations/llamafactory/chat.py",
        "self._frequency * counts -",
        "self._frequency * (counts > 0) -",
        (f"{_SETTINGS}test_penalties_are_those_of_openai",),
    ),
    Fault(
        "penalties count the tokens of the prompt",
        "kt_sft/integrations/llamafactory/chat.py",
        "answer = input_ids[:, self._prompt_tokens :]",
        "answer = input_ids",
        (f"{_SETTINGS}test_penalties_are_those_of_openai",),
    ),
    Fault(
        "a sampled answer depends on what is asked beside it",
        "kt_sft/integrations/llamafactory/chat.py",
        "        torch.set_rng_state(self._cpu)\n",
        "        pass\n",
        (f"{_SETTINGS}test_random_numbers_of_a_generation_are_its_own",),
    ),
    Fault(
        "the seed of a request is ignored",
        "kt_sft/serving/openai_routes.py",
        "seed=None if body.seed is None else (body.seed + i) % 2**63",
        "seed=None",
        (f"{_OPENAI}test_settings_reach_the_model",),
    ),
    Fault(
        "several choices are one answer several times",
        "kt_sft/serving/openai_routes.py",
        "(body.seed + i) % 2**63",
        "body.seed % 2**63",
        (f"{_OPENAI}test_several_choices",),
    ),
)
