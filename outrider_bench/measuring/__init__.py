"""Code shared by all benchmarks: measured system, workload, load generator, report and plots."""
