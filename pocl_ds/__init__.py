"""pocl_ds: distil a large language model into a small one, on clusters, by curriculum (POCL, arXiv
2506.05695).
"""

__version__ = "0.1.0"
