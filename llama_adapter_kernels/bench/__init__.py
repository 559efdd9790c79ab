"""Benchmarks of zero-init attention against what one would write without this package.

cases: what is timed. *_peers: the contestants. workload: equal results first. measure: how. results: the JSON.
report: the page. cli: the commands.
"""
