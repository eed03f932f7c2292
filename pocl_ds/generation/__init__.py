"""Responses and log-probabilities of a language model: one protocol, two backends."""
