"""Models: loading, the head apart from the backbone, depth pruning, and pairs of vocabularies."""
