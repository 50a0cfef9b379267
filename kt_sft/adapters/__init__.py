"""Adapters on disk: every form is read into one (`model.Adapter`) and written from it. Torch only, no PEFT.

Whoever asks opens them here: merge and convert, PEFT's doors, runs of LLaMA-Factory that resume.

model        the common form, and what is known of the base model
folder       where an adapter lies, which files of a directory hold tensors that are read, and which are something else
tensor_file  one such file: names, shapes, tensors, and a look at every number
schema       which values adapter_config.json may have, asked before anybody acts on them
options      LoRA options that are refused, at which doors and why
patterns     the regular expressions in it: keys of names, and whether matching comes to an end
peft_config  adapter_config.json: ranks, scales, targets
layout       what releases of PEFT make of fused experts, and which of them wrote an adapter
fused        PEFT's forms: two tensors per fused parameter of all experts
per_expert   vLLM and SGLang: two tensors per expert and projection
ktransformers  PEFT's file for the rest, the experts' LoRA beside it
gguf         llama.cpp
forms        which form a path has; conversion, written aside and renamed
report       what `kt-sft adapter inspect` shows
"""
