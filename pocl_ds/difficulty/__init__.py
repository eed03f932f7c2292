"""How hard a sample is to the initial student: measured (`score`), then ordered (`rank`)."""
