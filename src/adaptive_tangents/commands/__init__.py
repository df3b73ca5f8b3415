"""What the command line does, a module a command. The options are declared in `cli`, which imports these when they run."""
