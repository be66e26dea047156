"""A stand-in for Gaudi's software, on the CPU, for hosts that have no Gaudi. See torch/."""
