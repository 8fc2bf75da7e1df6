"""Benchmarks: every operator beside its peers, results checked before anything is timed."""
