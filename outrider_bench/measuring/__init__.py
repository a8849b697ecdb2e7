"""What every benchmark shares: the measured system, workload, load, report, plots."""
