"""A run folder told on one page: `report.html`. Reads files, computes nothing anew, and imports no torch."""
