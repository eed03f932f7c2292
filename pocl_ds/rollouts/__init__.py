"""On-policy and off-policy data: which responses an optimizer step trains on, and who generates them."""
