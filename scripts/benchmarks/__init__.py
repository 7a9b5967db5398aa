"""What `scripts/benchmark_attention.py` is made of: one idea a file."""
