"""This process: ranks and collectives, logs, progress and metrics, signals, exit codes, secrets."""
