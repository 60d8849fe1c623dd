"""The instruments: what the course measures with, and the commands that print it.

meter counts bytes, FLOPs and calls of any function. columns and table measure how they
grow; bench and bench_attention how fast it goes; gpu_code reads what a compiler made.
"""
