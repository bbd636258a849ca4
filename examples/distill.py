"""`ctopd distill` as a file, which `accelerate launch` can start; `--help` explains it."""

from trl_ctopd.cli.distill import main


if __name__ == "__main__":
    main()
