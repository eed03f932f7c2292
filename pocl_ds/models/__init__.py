"""Models: loading, output heads, attention, vocabularies, pruning, LoRA, cost and memory."""
