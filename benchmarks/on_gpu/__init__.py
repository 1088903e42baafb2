"""What `benchmarks/gpu.sh` verifies, measures and compares on a machine with one GPU or more; see docs/gpu.md."""
