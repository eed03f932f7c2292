"""`pocl bench gpu`: what this package does on one GPU, in parts that each have a time limit."""
