"""Policies select the responses that a step trains on; the rollout worker generates them."""
