"""A run: its directory, manifests and locks, the table of steps, and the pipeline that executes them."""
