"""Faults of what holds configurations against bounds: config.json, GGUF metadata, run files, rules."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_VALUES = "tests/formats/test_config_values.py::test_values_that_no_model_has"
_PLAN = "tests/placement/test_plan.py::"
_YAML = "tests/formats/test_yaml_files.py::"
_DOORS = "tests/integrations/transformers/test_hostile_configs.py::"
_OPENED = "tests/integrations/transformers/test_opened_once.py::"
_GGUF = "tests/formats/test_gguf_config.py::test_special_tokens_and_blocks"

FAULTS = (
    Fault(
        "a run's file has the last word, not the command line",
        "kt_sft/integrations/llamafactory/run_file.py",
        "OmegaConf.merge(given, OmegaConf.from_dotlist(words))",
        "OmegaConf.merge(OmegaConf.from_dotlist(words), given)",
        (f"{_PLAN}test_files_and_overrides_mean_what_they_mean_to_llamafactory",),
    ),
    Fault(
        "interpolations of a run's file have no limit",
        "kt_sft/integrations/llamafactory/run_file.py",
        "    if length > _MOST_INTERPOLATED:",
        "    if False:",
        (f"{_PLAN}test_what_omegaconf_refuses_is_one_line",),
    ),
    Fault(
        "a switch passes for a number",
        "kt_sft/formats/config_values.py",
        "type(item) is int and self.least <= item <= self.most",
        "isinstance(item, int) and self.least <= item <= self.most",
        (_VALUES,),
    ),
    Fault(
        "the token behind the last is one of the vocabulary",
        "kt_sft/formats/config_values.py",
        "most = vocabulary - 1 if",
        "most = vocabulary if",
        (_VALUES,),
    ),
    Fault(
        "aliases count once, however large what they stand for is",
        "kt_sft/formats/yaml_files.py",
        "count += sizes[event.anchor]",
        "count += 1",
        (f"{_YAML}test_yaml_that_is_refused",),
    ),
    Fault(
        "run files go to OmegaConf unseen",
        "kt_sft/integrations/llamafactory/parsing.py",
        'sys.argv[1].endswith((".yaml", ".yml"))',
        'sys.argv[1].endswith(".never")',
        (f"{_DOORS}test_run_files_are_looked_at_before_omegaconf_reads_them",),
    ),
    Fault(
        "pipes are waited for",
        "kt_sft/formats/regular_file.py",
        "if stat.S_ISREG(mode):",
        "if not stat.S_ISDIR(mode):",
        (f"{_YAML}test_files_that_are_none",),
    ),
    Fault(
        "special tokens of a GGUF file are lost",
        "kt_sft/formats/gguf_config.py",
        'f"tokenizer.ggml.{name}_token_id") for config, name in _SPECIAL',
        'f"tokenizer.ggml.{config}_token_id") for config, name in _SPECIAL',
        (_GGUF,),
    ),
    Fault(
        "generation_config.json is read after the weights",
        "kt_sft/integrations/transformers/model_files.py",
        "    if not file.exists():",
        "    if True:",
        (f"{_DOORS}test_generation_config_is_read_before_the_weights",),
    ),
    Fault(
        "what transformers cannot build is a traceback in load_model",
        "kt_sft/integrations/transformers/model_files.py",
        '    with torch.device("meta"), errors_in_one_line(path, trust_remote_code=trust_remote_code):',
        '    with torch.device("meta"):',
        (f"{_DOORS}test_config_values",),
    ),
    Fault(
        "files that change between the checks and the load are not seen",
        "kt_sft/integrations/transformers/opened.py",
        "        if any(marks(place) != seen for place, seen in self._seen.items()):",
        "        if False:",
        (f"{_OPENED}test_files_that_change_between_check_and_load_are_opened_again",),
    ),
    Fault(
        "a later part of a GGUF file may change between the checks and the load",
        "kt_sft/integrations/transformers/opened.py",
        "        return not isinstance(weights, GgufIndex) or weights.unchanged.all()",
        "        return True",
        (
            "tests/sources/test_gguf_experts.py::"
            "test_every_part_of_a_split_file_is_looked_at_before_what_was_opened_is_loaded",
        ),
    ),
    Fault(
        "the load opens again what the checks have opened",
        "kt_sft/integrations/transformers/opened.py",
        "        if is_read and self._shapes == shapes_of(model) and self.specs == find_experts(model):",
        "        is_read = False\n        if is_read:",
        (f"{_OPENED}test_check_and_load_share_what_is_opened",),
    ),
    Fault(
        "a file that changes after its header was read is read",
        "kt_sft/formats/safetensors_index.py",
        "        unchanged = UnchangedFiles(files)\n",
        "        unchanged = UnchangedFiles()\n",
        (f"{_OPENED}test_file_that_changes_after_its_header_was_read_is_not_read",),
    ),
)
