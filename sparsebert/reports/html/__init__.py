"""The one-file HTML report of runs."""
