"""Names of files that PEFT and transformers give, which several rooms look for."""

from __future__ import annotations

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"  # of older releases
MODEL_CONFIG = "config.json"
# By which readers know that an adapter or a model is there.
ENTRIES = (ADAPTER_CONFIG, MODEL_CONFIG)
