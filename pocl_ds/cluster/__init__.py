"""SLURM: a run as dependent jobs that requeue themselves, and checks of machines before them."""
