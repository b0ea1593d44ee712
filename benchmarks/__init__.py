"""What te_dynamo costs, as ratios to Inductor in the same run: `python -m benchmarks`."""
