"""A run: its directory, its manifests, the table of steps, and the pipeline that runs them."""
