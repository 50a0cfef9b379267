"""Faults of what an adapter directory may hold besides our own form: layouts, kinds of training; of side tensors."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_KT = "tests/adapters/test_adapter_ktransformers.py::"
_LAYOUT = "tests/adapters/test_adapter_layout.py::"
_FILES = "tests/adapters/test_adapter_files.py::"
_UNREAD = f"{_FILES}test_tensors_that_nobody_reads_are_named"
_DOORS = "tests/adapters/test_adapter_doors.py::test_every_kind_through_every_door"
_KINDS = "tests/integrations/merge/test_merging_kinds.py::"
_SIDE = "tests/integrations/gguf/test_gguf_side_tensors.py::"
_STORED = f"{_SIDE}test_weights_are_stored_numbers_times_their_scale"
_SIDE_SAFETENSORS = "tests/sources/test_safetensors_side_tensors.py::"
_NON_FINITE = "tests/integrations/transformers/test_non_finite_experts.py::"
_STALE = "tests/sources/test_stale_containers.py::"
_FAILURES = "tests/convert/test_convert_failures.py::"

_KT_FILE = "kt_sft/adapters/ktransformers.py"
_LAYOUT_FILE = "kt_sft/adapters/layout.py"
_FOLDER = "kt_sft/adapters/folder.py"
_KINDS_FILE = "kt_sft/adapters/kinds.py"
_CHANGES = "kt_sft/adapters/changes.py"
_PLAIN = "kt_sft/adapters/plain.py"
_GGUF = "kt_sft/formats/gguf_expert_tensors.py"
_FINITE = "kt_sft/formats/finite.py"
_PACKED = "kt_sft/sources/packed.py"

FAULTS = (
    # --- KTransformers' adapters
    Fault(
        "the scale of KTransformers' experts is alpha over the config's r",
        _KT_FILE,
        "scales[target] = alpha / ranks[target]",
        'scales[target] = alpha / config["r"]',
        (f"{_KT}test_scale_is_alpha_over_the_rank_of_the_tensors",),
    ),
    Fault(
        "KTransformers' experts are added without a scale",
        _KT_FILE,
        "scales[target] = alpha / ranks[target]",
        "scales[target] = 1.0",
        (f"{_KT}test_prefixes_and_types",),
    ),
    Fault(
        "KTransformers' gate and up are exchanged",
        _KT_FILE,
        "found[projection] = Lora(",
        'found[{"gate": "up", "up": "gate"}.get(projection, projection)] = Lora(',
        (f"{_KT}test_prefixes_and_types",),
    ),
    Fault(
        "KTransformers' layers are read off by one",
        _KT_FILE,
        'layer_of(name) == int(one["layer"])]',
        'layer_of(name) == int(one["layer"]) ^ 1]',
        (f"{_KT}test_prefixes_and_types",),
    ),
    Fault(
        "half a pair of KTransformers is left out",
        _KT_FILE,
        "            if not pair:\n",
        "            if len(pair) < 2:\n",
        (f"{_KT}test_what_does_not_fit_is_named",),
    ),
    Fault(
        "another rank than that of KTransformers' manifest is taken",
        _KT_FILE,
        "    if wrong:\n",
        "    if False:\n",
        (f"{_KT}test_contradictions",),
    ),
    Fault(
        "files of another size than KTransformers' manifest says are taken",
        _KT_FILE,
        '    _check_sizes(folder, manifest.get("artifacts"))\n',
        "",
        (f"{_KT}test_contradictions",),
    ),
    # --- layouts of PEFT's releases
    Fault(
        "square experts of PEFT 0.19 are read as of 0.18",
        _LAYOUT_FILE,
        "if release < (0, 19):",
        "if release < (0, 20):",
        (f"{_LAYOUT}test_version_tells_the_layout_of_square_experts",),
    ),
    Fault(
        "our mark overrules the release that wrote an adapter",
        _LAYOUT_FILE,
        "if mark in (released or LAYOUTS) and len(released) != 1:",
        "if mark in LAYOUTS:",
        (f"{_LAYOUT}test_version_before_mark",),
    ),
    Fault(
        "a layout that nothing tells is guessed",
        _LAYOUT_FILE,
        "if any(one.exchanged != left[0].exchanged for one in left):",
        "if False:",
        (f"{_LAYOUT}test_our_mark_tells_it_where_the_version_does_not",),
    ),
    Fault(
        "widths overrule the release that wrote an adapter",
        _LAYOUT_FILE,
        "or ([] if stated else fitting)",
        "or fitting",
        (f"{_LAYOUT}test_widths_that_contradict_the_version",),
    ),
    Fault(
        "a saved adapter does not say its layout",
        "kt_sft/integrations/peft/targets.py",
        "self.adapter_dropout, RUNNING_FORM)",
        "self.adapter_dropout, None)",
        (f"{_LAYOUT}test_saved_adapters_say_their_layout",),
    ),
    # --- files of an adapter directory
    Fault(
        "tensor files that nobody reads are not named",
        _FOLDER,
        "    if unread:\n",
        "    if False:\n",
        (f"{_UNREAD}[lora_experts.safetensors]",),
    ),
    Fault(
        "a pickle beside the adapter is taken for a part of it",
        _FOLDER,
        "known = (*(read or (main, EXPERTS_NAME)), *_REWARD_HEADS)",
        "known = (*(read or (main, ADAPTER_PICKLE, EXPERTS_NAME)), *_REWARD_HEADS)",
        (f"{_UNREAD}[adapter_model.bin]",),
    ),
    Fault(
        "files with endings in capitals are passed over",
        _FOLDER,
        "name.lower().endswith(",
        "name.endswith(",
        (f"{_UNREAD}[extra.GGUF]",),
    ),
    # --- kinds of training
    Fault(
        "LoRA on a tied head is written for llama.cpp",
        _KINDS_FILE,
        'is_tied = f"{name}.weight" in base.tied',
        "is_tied = False",
        (f"{_DOORS}[head_tied]",),
    ),
    Fault(
        "LoRA on a router is written for engines that ignore it",
        _KINDS_FILE,
        '"router" if name in base.routers else "tied_head"',
        '"tied_head"',
        (f"{_DOORS}[router_linear]",),
    ),
    Fault(
        "biases without a place are left out of a merge",
        _KINDS_FILE,
        'if extra.kind == "lora_bias" and',
        "if False and",
        (f"{_DOORS}[lora_bias_alone]",),
    ),
    Fault(
        "a saved embedding changes the tied head",
        _CHANGES,
        "_replaced(adapter, name), not _has_own_copy(adapter, name))",
        "_replaced(adapter, name), True)",
        (f"{_DOORS}[saved_tied]",),
    ),
    Fault(
        "trained rows of a tied embedding do not reach the head",
        _CHANGES,
        "extra.apply, extra.parameter not in adapter.base.tied)",
        "extra.apply, False)",
        (f"{_DOORS}[tokens_tied]",),
    ),
    Fault(
        "new values of two adapters are added up",
        _CHANGES,
        "if replacing is not None and len(sources) > 1:",
        "if False:",
        (f"{_KINDS}test_adapters_of_different_kinds_are_added",),
    ),
    Fault(
        "DoRA's magnitudes multiply the rows",
        _PLAIN,
        "weight * (magnitude / weight.norm(dim=axis, keepdim=True))",
        "weight * magnitude",
        (f"{_DOORS}[dora]",),
    ),
    Fault(
        "trained rows go to the first rows of the embedding",
        _PLAIN,
        "weight[indices] = read()",
        "weight[: len(indices)] = read()",
        (f"{_DOORS}[tokens]",),
    ),
    Fault(
        "LoRA on an embedding is not scaled",
        _PLAIN,
        "Lora(b().mT, a().mT, scale)",
        "Lora(b().mT, a().mT, 1.0)",
        (f"{_DOORS}[embedding]",),
    ),
    Fault(
        "biases of lora_B are not scaled",
        _PLAIN,
        "bias + scale * read()",
        "bias + read()",
        (f"{_DOORS}[lora_bias]",),
    ),
    Fault(
        "an adapter without what its config names is taken",
        _PLAIN,
        "        if missing:\n",
        "        if False:\n",
        (f"{_KINDS}test_an_adapter_without_what_its_config_names_is_refused",),
    ),
    # --- tensors beside the experts' weights
    Fault(
        "scales beside a GGUF file's experts are ignored",
        _GGUF,
        "        return values\n",
        "        return [1.0] * count\n",
        (f"{_STORED}[BF16-separate-scaled-BF16]",),
    ),
    Fault(
        "up comes first in a GGUF file's gate_up",
        _GGUF,
        "(slice(0, sizes.inter), slice(sizes.inter, 2 * sizes.inter))",
        "(slice(sizes.inter, 2 * sizes.inter), slice(0, sizes.inter))",
        (f"{_STORED}[BF16-fused-plain-BF16]",),
    ),
    Fault(
        "unknown tensors beside a GGUF file's experts are passed over",
        _GGUF,
        "        if left - unread:\n",
        "        if False:\n",
        (f"{_SIDE}test_what_is_not_known_is_refused_by_name",),
    ),
    Fault(
        "the scale of up is that of up alone",
        _GGUF,
        "            scales = self._scales(up_base, sizes.num_experts)\n",
        "            self._scales(up_base, sizes.num_experts)\n",
        (f"{_SIDE}test_scale_of_up_is_that_of_both_halves",),
    ),
    Fault(
        "Gemma 4's scale of the router is multiplied into down",
        _GGUF,
        "if self.sizes.has_router_scale and base ==",
        "if False and base ==",
        (f"{_SIDE}test_gemma_4_has_its_routers_scale_beside_down",),
    ),
    Fault(
        "unknown tensors beside a checkpoint's experts are passed over",
        "kt_sft/models/expert_keys.py",
        "        _check_beside(layers, others, source)\n",
        "",
        (f"{_SIDE_SAFETENSORS}test_other_tensors_are_refused_at_every_door",),
    ),
    # --- numbers that are none
    Fault(
        "minus infinity is finite",
        "kt_sft/formats/finite.py",
        "ends = torch.stack(torch.aminmax(tensor))",
        "ends = tensor.amax()",
        (f"{_KINDS}test_finite",),
    ),
    Fault(
        "numbers that the written type cannot hold are written as infinity",
        "kt_sft/formats/finite.py",
        "(ends / steps).to(kind or ends.dtype)",
        "(ends / steps)",
        (f"{_KINDS}test_finite",),
    ),
    Fault(
        "NaN in an expert is packed",
        _FINITE,
        "if not weight.is_floating_point() or math.isfinite(weight.sum().item()):",
        "if True:",
        (f"{_NON_FINITE}test_tensors_of_a_caller",),
    ),
    Fault(
        "infinity in an expert is packed",
        _FINITE,
        "if not weight.is_floating_point() or math.isfinite(weight.sum().item()):",
        "if not weight.is_floating_point() or not weight.sum().isnan():",
        (f"{_NON_FINITE}test_tensors_of_a_caller",),
    ),
    Fault(
        "large numbers are taken for infinity",
        _FINITE,
        "        if len(places):\n",
        "        if True:\n",
        (f"{_NON_FINITE}test_large_finite_numbers_are_taken",),
    ),
    # --- derived files and what a failure leaves
    Fault(
        "a container of an earlier state of the model is used without a word",
        _PACKED,
        "if hash_source(path, manifest.source_hash) != held[name]:",
        "if False:",
        (f"{_STALE}test_model_trained_further_is_named",),
    ),
    Fault(
        "files that are newer than their container are not named",
        _PACKED,
        "stat.st_mtime_ns > made and",
        "False and",
        (f"{_STALE}test_later_files_whose_digest_is_of_samples",),
    ),
    Fault(
        "samples of a large file are all of its beginning",
        "kt_sft/formats/source_hash.py",
        "between * block // (_BLOCKS - 1)",
        "between * 0 * block",
        (f"{_STALE}test_digest_is_of_all_bytes_or_of_samples",),
    ),
    Fault(
        "the size of a file is not in its digest",
        "kt_sft/formats/source_hash.py",
        'hashlib.sha256(size.to_bytes(8, "little"))',
        "hashlib.sha256()",
        (
            "tests/formats/test_source_digest.py::test_digest_follows_the_size",
            f"{_STALE}test_digest_is_of_all_bytes_or_of_samples",
        ),
    ),
    Fault(
        "a failed conversion leaves its files",
        "kt_sft/convert/folder.py",
        "_take_back(folder, before, is_useless=isinstance(error, Unpackable))",
        "pass",
        (f"{_FAILURES}test_a_failure_leaves_nothing_that_was_not_there",),
    ),
    Fault(
        "a failed conversion leaves its empty folder",
        "kt_sft/convert/folder.py",
        "\n            remove_empty(*missing)\n            raise",
        "\n            raise",
        (f"{_FAILURES}test_a_failure_leaves_nothing_that_was_not_there",),
    ),
    Fault(
        "an overwrite takes the files of the old container",
        "kt_sft/convert/run.py",
        "    held = files_of(folder)\n    done",
        "    held = set()\n    done",
        (f"{_FAILURES}test_an_overwrite_that_fails_late_keeps_the_old_container",),
    ),
    Fault(
        "targets of the config may lack their pairs",
        "kt_sft/adapters/plain.py",
        "for name in self._targets() if name not in self._stems]",
        "for name in self._targets() if name in ()]",
        (
            "tests/adapters/test_adapter_faults.py::test_damaged_adapters_give_one_clear_error",
            "tests/adapters/test_adapter_ktransformers.py::test_attention_that_the_config_names_is_not_left_out",
        ),
    ),
)
