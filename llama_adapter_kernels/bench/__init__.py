"""Benchmarks of zero-init attention against what one would write without this package.

cases: what is timed. *_peers: the contestants. workload: one race, and the check that comes before it. measure: how
calls are timed. results: the JSON file. report, plots, tables: what is shown of it. regression: recorded bars.
"""
