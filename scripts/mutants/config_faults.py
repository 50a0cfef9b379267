"""Faults of what holds configurations against bounds: config.json, GGUF metadata, run files, rules."""

from __future__ import annotations

from scripts.mutants.fault import Fault

_VALUES = "tests/unit/test_config_values.py::test_values_that_no_model_has"
_YAML = "tests/unit/test_yaml_files.py::"
_DOORS = "tests/integration/test_hostile_configs.py::"
_GGUF = "tests/unit/test_gguf_config.py::test_special_tokens_and_blocks"

FAULTS = (
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
        "kt_sft/integrations/transformers/loading.py",
        '        meta_model(model_config, from_pretrained_kwargs.get("trust_remote_code"))\n    leaves_code',
        "        pass\n    leaves_code",
        (f"{_DOORS}test_config_values",),
    ),
)
