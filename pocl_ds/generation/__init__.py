"""Text and log-probabilities out of a language model: one protocol, two backends chosen by name."""
