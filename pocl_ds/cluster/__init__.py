"""SLURM: a run as dependent jobs that survive the cluster, and the look at a machine before a job
burns hours on it.
"""
