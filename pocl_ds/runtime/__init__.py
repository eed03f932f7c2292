"""The process: ranks and collectives, logging and metrics, signals and exit codes, credentials."""
