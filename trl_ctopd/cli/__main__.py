"""`python -m trl_ctopd.cli`, and `accelerate launch -m trl_ctopd.cli`, which take a module in place of a command."""

from . import main


main()
