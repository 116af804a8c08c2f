"""GPU kernels, one folder an op. Importing this package imports no Triton (transformers probes the name)."""
