"""Every use of a private name of a library, one file per library."""
