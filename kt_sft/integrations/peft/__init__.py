"""Expert LoRA owned by stock PEFT and computed by the kernels.

PEFT wraps the experts' placeholder parameters (`LoraConfig.target_parameters`), owns lora_A and lora_B, saves and loads
them; `bind_experts` hands these very parameters to `RoutedExperts`, which multiplies with them. An adapter written
here is a plain PEFT adapter.

    api          get_peft_model, load_adapter, count_parameters
    targets      user's LoraConfig -> one that PEFT accepts and that names the experts
    names        names in a LoraConfig that mean nothing in the model
    injecting    the step around PEFT's injection, so that anybody's call binds the experts
    coverage     what trains, by kind, and whether that is what was asked for
    binding      PEFT's wrappers around the experts: pass-through forward, merge into packed weights
    outside      PEFT layers outside the experts that need help: routers, tied heads
    limits       what can be trained and not be merged, converted or saved
    adapter_dir  PEFT's config of a saved adapter, whether it fits the model, and a copy in the running form
"""

from kt_sft.integrations.peft.api import count_parameters, get_peft_model, load_adapter
from kt_sft.integrations.peft.binding import bind_experts, expose_placeholders, hide_placeholders
from kt_sft.integrations.peft.targets import ExpertLoraConfig, prepare_lora_config

__all__ = [
    "ExpertLoraConfig",
    "bind_experts",
    "count_parameters",
    "expose_placeholders",
    "get_peft_model",
    "hide_placeholders",
    "load_adapter",
    "prepare_lora_config",
]
