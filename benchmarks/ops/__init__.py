"""One file of cases per operator."""
