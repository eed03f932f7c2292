"""The steps `score` and `rank`: how difficult each sample is for the initial student."""
