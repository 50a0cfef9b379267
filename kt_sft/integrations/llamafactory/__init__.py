"""Plug into stock LLaMA-Factory.

autoload     the way in: entry point, finder, status for `kt-sft doctor`
hook         the patch points
args         configuration keys, checks
run_file     reading a configuration
planning     what `kt-sft plan` shows
adapters     what LLaMA-Factory calls instead of PEFT
chat         its chat model for kt_sft.serving
"""
