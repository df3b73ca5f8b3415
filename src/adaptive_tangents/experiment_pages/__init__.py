"""What each experiment shows: its figures and its page, one file an experiment; nothing is measured here."""
