"""The experiments of benchmarks/residual.py: why residual learning works, measured on small networks."""
