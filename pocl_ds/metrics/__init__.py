"""Metrics of generated text: ROUGE-L, exact match, repetition; and the bootstrap of their means."""
