"""`python -m outrider_bench COMMAND`: runs `outrider bench COMMAND` without an installation."""

from outrider.cli import main
from outrider_bench.commands import bench

if __name__ == "__main__":
    main(bench)
