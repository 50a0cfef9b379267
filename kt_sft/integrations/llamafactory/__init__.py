"""Plug into stock LLaMA-Factory.

autoload     the way in: entry point, finder, status for `kt-sft doctor`
hook         the patch points
args         configuration keys, checks
adapters     what LLaMA-Factory calls instead of PEFT
chat         its chat model for kt_sft.serving
"""
