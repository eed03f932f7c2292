"""The command line `pocl`: parse arguments, call a step, print the result."""
