"""The trainer, checkpoints, batch layout, watchdog and non-finite step handling."""
