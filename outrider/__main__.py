"""`python -m outrider`: the command line, if the `outrider` script is not on PATH."""

from outrider.cli import main

if __name__ == "__main__":
    main()
