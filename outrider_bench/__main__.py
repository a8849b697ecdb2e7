"""`python -m outrider_bench COMMAND`: as `outrider bench COMMAND`, also where not installed."""

from outrider.cli import main
from outrider_bench.commands import bench

if __name__ == "__main__":
    main(bench)
