"""The steps of `benchmarks/gpu.sh`, which verify and measure on a machine with GPUs; see docs/gpu.md."""
