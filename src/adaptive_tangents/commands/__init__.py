"""The work of each command, one module per command. `cli` declares the options and imports these modules when they run."""
