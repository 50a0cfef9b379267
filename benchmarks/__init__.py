"""Speed measurements; never part of the test suite. `python -m benchmarks.bench_moe_layer --help`."""
