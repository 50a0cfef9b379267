"""Adapters on disk: every form is read into one (`model.Adapter`) and written from it. Torch only, no PEFT.

model        the common form, and what is known of the base model
peft_config  adapter_config.json: ranks, scales, targets
fused        PEFT 0.18 and 0.19: two tensors per projection of all experts
per_expert   vLLM and SGLang: two tensors per expert and projection
gguf         llama.cpp
forms        which form a path has; conversion, written aside and renamed
report       what `kt-sft adapter inspect` shows
"""
