"""Teachers: online, ensembles, and cached outputs (writer, store, choice of mode)."""
