"""Speed measurements; never part of the test suite. `python -m benchmarks.bench_moe_layer --help`.

bench_*, targets       commands: one question each, and every demand at once; report writes docs/performance.md
problem                the experts of one MoE layer as data, and torch's ways to compute them
kt_sft_contender       ours, from the same data, and gguf_mix from blocks of GGUF files; kt_kernel_opponent
                       another project's
contest                checks the contenders' answers and times them in shared rounds
products               the same for single products on packed weights
demands                the targets, and the verdict on measured figures
session, harness       a command's options, machine and record; rounds between probes of the machine (roofline)
"""
