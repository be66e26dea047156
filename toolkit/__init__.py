"""Build, verify and use PyTorch containers for medical imaging on HPC clusters.

Importing this package imports neither torch, monai, spython nor requests:
the command line has to start at once on a login node.
"""

__version__ = "0.1.0"
