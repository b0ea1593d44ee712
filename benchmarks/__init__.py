"""The cost of te_dynamo, as ratios to Inductor in the same run: `python -m benchmarks`."""
