"""What survives a restart: content-addressed files and a table of what they are."""
