"""Teachers: online, ensembles, and cached outputs (step, writer, store, mode selection)."""
