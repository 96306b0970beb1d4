"""What `benchmark_t2v.py` is made of: matrix and variants, the processes that run them, what is told of rows."""
